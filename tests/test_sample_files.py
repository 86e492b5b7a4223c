import shutil

import pandas as pd
import pytest
import torch

from lqf_lightning.finished_run import steps_taken
from lqf_lightning.score import score
from tiny import compose, run_tiny

OPTIONS = ["method=lqf_sgd", "method.solver=kernel", "method.ridge=0.1", "callbacks=[]", "test=false"]


def chosen(tmp_path, folder_of_shapes):
    """A file of half the training samples."""
    run_tiny(tmp_path / "first", folder_of_shapes, "method=linear_probe", "callbacks=[]", "trainer.max_epochs=1")
    manifest = pd.read_parquet(tmp_path / "first" / "manifest.parquet")
    rows = manifest.loc[manifest["split"] == "train", ["index"]]
    rows.iloc[::2].to_parquet(tmp_path / "subset.parquet")
    return tmp_path / "subset.parquet", rows.iloc[::2]["index"].tolist()


def test_a_finished_run_is_opened_again_when_its_files_are_gone(tmp_path, folder_of_shapes):
    file, index = chosen(tmp_path, folder_of_shapes)
    run_tiny(tmp_path / "run", folder_of_shapes, *OPTIONS, f"data.subset={file}")
    file.unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    checkpoint = tmp_path / "moved" / "checkpoints" / "last.ckpt"
    score(compose(f"checkpoint={checkpoint}", "progress=none", f"paths.output_dir={tmp_path}/out", name="score"))
    assert pd.read_parquet(tmp_path / "out" / "sample_information.parquet")["index"].tolist() == index


def test_a_run_does_not_go_on_with_a_changed_file(tmp_path, folder_of_shapes):
    file, _ = chosen(tmp_path, folder_of_shapes)
    options = [*OPTIONS[3:], "method=finetune", f"data.subset={file}"]
    run_tiny(tmp_path / "run", folder_of_shapes, *options, "trainer.max_epochs=1")
    pd.read_parquet(file).iloc[1:].to_parquet(file)
    with pytest.raises(ValueError, match=r"has been changed since the run in .* began.*data_subset\.parquet"):
        run_tiny(tmp_path / "run", folder_of_shapes, *options)


def test_steps_of_a_stopped_run_are_told_from_those_of_its_schedule(tmp_path, folder_of_shapes):
    run_tiny(tmp_path, folder_of_shapes, "method=finetune", "callbacks=[]", "test=false", "trainer.max_epochs=2")
    best, last = (tmp_path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    content = torch.load(last, weights_only=True)
    assert (content["global_step"], content["planned_steps"]) == (4, 4)
    assert torch.load(best, weights_only=True)["planned_steps"] == 4
    torch.save(content | {"global_step": 3, "planned_steps": 8}, last)  # as if it had been stopped
    torch.save(content | {"global_step": 2, "planned_steps": 8}, best)
    assert steps_taken(best) == steps_taken(last) == (3, 8)
    old = {key: value for key, value in content.items() if key != "planned_steps"}
    torch.save(old, last)  # of an earlier version
    assert steps_taken(last) == (4, 4)
