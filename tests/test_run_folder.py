import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from lqf_lightning.run_folder import newest_checkpoint, write_json, write_metrics, write_start


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    write_metrics(tmp_path, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(0.5), "e": 3})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": None, "b": None, "c": None, "d": 0.5, "e": 3.0}


def test_later_metrics_join_the_earlier_ones(tmp_path):
    write_metrics(tmp_path, {"val/acc": 0.1, "val/loss": 2.0})
    write_metrics(tmp_path, {"val/acc": 0.2, "test/acc": 0.3})
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {"val/acc": 0.2, "val/loss": 2.0, "test/acc": 0.3}


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    seen = []
    write_text = Path.write_text

    def watch(self, text):
        count = write_text(self, text[: len(text) // 2])  # the process is killed here, or a reader comes by
        seen.append(json.loads(path.read_text()))
        write_text(self, text)
        return count

    monkeypatch.setattr(Path, "write_text", watch)
    write_json(path, {"a": 2})
    assert seen == [{"a": 1}]
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_content_that_json_does_not_know_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_start_of_a_run_can_be_told_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lqf-train", "seed=3"])
    folder = tmp_path / "new" / "run"
    write_start(folder, OmegaConf.create({"seed": 3, "data": {"seed": "${seed}"}, "root": str(tmp_path)}))
    text = (folder / "config.yaml").read_text()
    assert OmegaConf.load(folder / "config.yaml") == {"seed": 3, "data": {"seed": 3}, "root": str(tmp_path)}
    assert "$" not in text
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"] == ["lqf-train", "seed=3"]
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    write_start(tmp_path, OmegaConf.create({"seed": 3}))
    write_metrics(tmp_path, {"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def save(folder, name, step, age):
    path = folder / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step}, path)
    os.utime(path, (1e9 - age, 1e9 - age))


def test_the_newest_checkpoint_has_the_latest_step_and_was_written_last(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, "copied", step=4, age=0)
    save(tmp_path, "best", step=9, age=20)
    save(tmp_path, "last", step=9, age=10)
    save(tmp_path, "zero", step=9, age=30)
    assert newest_checkpoint(tmp_path).name == "last.ckpt"
