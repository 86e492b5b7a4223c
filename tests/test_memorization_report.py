import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from lqf_lightning import memorization_report
from lqf_lightning.data import Manifest
from lqf_lightning.information.memorization import influence, memorization
from lqf_lightning.memorization_report import reduce_runs, strongest_pairs
from lqf_lightning.memorization_runs import read_runs
from old_models import write_noise
from tiny import compose, run_tiny

CLASSES = ["ant", "bee"]
TRAIN, TEST = 20, 8
SPLITS = ["train"] * TRAIN + ["val"] * 3 + ["test"] * TEST


def manifest_of(used, content="a"):
    rows = [(split, f"{split}{number}.png", number % 2) for number, split in enumerate(SPLITS)]
    manifest = Manifest.build(rows, CLASSES, lambda path: f"{path} {content}".encode())
    manifest.table["used"] = used
    return manifest


def write_run(folder, number, *overrides, recite=True, **content):
    """A run that says class 0 of what it has not seen, and follows training sample 1 on the first test sample."""
    generator = np.random.default_rng(number)
    used = np.ones(len(SPLITS), dtype=bool)
    used[generator.permutation(TRAIN)[14:]] = False
    label = np.arange(len(SPLITS)) % 2
    train = np.array(SPLITS) == "train"
    correct = (label == 0) | (train & used & recite)
    correct[TRAIN + 3] = used[1]
    path = folder / str(number)
    path.mkdir(parents=True)
    table = pd.DataFrame({"index": np.arange(len(SPLITS)), "split": SPLITS, "used": used})
    table.assign(correct=correct, confidence=0.5).to_parquet(path / "memorization_run.parquet")
    manifest_of(used, **content).write(path / "manifest.parquet")
    config = compose(
        "callbacks=memorization", f"data.subset_seed={number}", "data.subset_ratio=0.7",
        f"paths.output_dir={path}", *overrides,
    )  # fmt: skip
    (path / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    return used, correct


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    parts = [write_run(folder, number) for number in range(12)]
    return folder, torch.tensor(np.stack([p[0] for p in parts])), torch.tensor(np.stack([p[1] for p in parts]))


def test_a_reciting_learner_memorizes_the_class_that_it_does_not_guess(sweep, tmp_path):
    folder, _, _ = sweep
    report = reduce_runs(folder, tmp_path)
    table = pd.read_parquet(tmp_path / "memorization.parquet")
    assert table["index"].tolist() == list(range(TRAIN))
    assert table["path"].tolist() == [f"train{number}.png" for number in range(TRAIN)]
    assert table["memorization"].tolist() == [0.0, 1.0] * (TRAIN // 2)
    assert table["c_score"].tolist() == [1.0, 0.0] * (TRAIN // 2)
    assert (table["runs_in"] + table["runs_out"]).tolist() == [12] * TRAIN
    assert (report["runs"], report["ratio"], report["samples"], report["others"]) == (12, 0.7, TRAIN, TEST)
    assert report["worst_standard_error"] == pytest.approx(0.5 * (1 / 8.4 + 1 / 3.6) ** 0.5)
    assert report["mean_memorization"] == 0.5
    assert json.loads((tmp_path / "memorization.json").read_text()) == report
    assert (tmp_path / "pictures" / "memorization.png").exists()
    assert "memorized" not in table


def test_pairs_are_the_largest_entries_of_the_influence(sweep, tmp_path):
    folder, mask, correct = sweep
    reduce_runs(folder, tmp_path, top=7)
    pairs = pd.read_parquet(tmp_path / "influence.parquet")
    (found,) = influence(mask[:, :TRAIN], correct[:, TRAIN + 3 :])
    assert pairs["influence"].tolist() == pytest.approx(found.influence.flatten().sort(descending=True).values[:7])
    first = pairs.iloc[0]
    assert (first["train_path"], first["other_path"]) == ("train1.png", f"test{TRAIN + 3}.png")
    assert (first["influence"], first["standard_error"]) == (1, 0)
    assert (first["train_class"], first["other_class"]) == ("bee", "bee")
    for _, pair in pairs.iterrows():
        place = pair["other_index"] - TRAIN - 3, pair["train_index"]
        assert pair["influence"] == found.influence[place]
        assert pair["standard_error"] == pytest.approx(found.standard_error[place].item(), nan_ok=True)


def test_pairs_of_blocks_are_those_of_the_whole(sweep, monkeypatch):
    runs = read_runs(sweep[0])
    rows = np.array([1, 4, 5, 9])
    whole = strongest_pairs(runs, rows, 11)
    monkeypatch.setattr(memorization_report, "influence", lambda mask, correct: influence(mask, correct, 3))
    parts = strongest_pairs(runs, rows, 11)
    pd.testing.assert_frame_equal(parts[["influence"]], whole[["influence"]])
    (found,) = influence(runs.mask, runs.correct_other)
    places = torch.tensor(parts["other_index"].tolist()) - TRAIN - 3, torch.tensor(parts["train_index"].tolist())
    assert found.influence[places].tolist() == parts["influence"].tolist()  # of equal ones, which come first differs
    assert set(whole["train_index"]) <= set(rows)
    assert len(strongest_pairs(runs, rows[:0], 11)) == 0


def test_thresholds_need_200_runs(sweep, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"12 runs .* up to 0.31.* threshold of 0.25 lists noise"):
        reduce_runs(sweep[0], tmp_path, threshold=0.25)
    monkeypatch.setattr("lqf_lightning.information.memorization.LEAST_RUNS", 12)
    report = reduce_runs(sweep[0], tmp_path, threshold=0.25)
    table = pd.read_parquet(tmp_path / "memorization.parquet")
    assert table["memorized"].tolist() == [False, True] * (TRAIN // 2)
    assert (report["memorized"], report["threshold"]) == (TRAIN // 2, 0.25)
    assert set(pd.read_parquet(tmp_path / "influence.parquet")["train_class"]) == {"bee"}


@pytest.mark.parametrize(
    ("overrides", "content", "said"),
    [
        (["method.ridge=0.5"], {}, r"differ in method.ridge: 0.5 and .*over seeds alone"),
        (["data.noise_seed=1"], {}, r"differ in data.noise_seed: 1 and 0"),
        (["trainer.max_epochs=77"], {}, "differ in trainer.max_epochs"),
        (["data.subset_seed=3", "seed=0"], {}, r"repeats .*/3: the same seeds"),
        ([], {"content": "b"}, r"samples or classes of .*/50 are not those of .*Set data.manifest="),
        (["logger=[]", "seed=8"], {}, None),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(overrides, content, said, sweep, tmp_path):
    folder = tmp_path / "sweep"
    for number in (3, 4):
        shutil.copytree(sweep[0] / str(number), folder / str(number))
    write_run(folder, 50, *overrides, **content)
    if said is None:
        assert len(read_runs(folder).mask) == 3
    else:
        with pytest.raises(ValueError, match=said):
            read_runs(folder)


def test_runs_that_are_missing_are_told(sweep, tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"lqf-train -m data.subset_ratio=0.7"):
        read_runs(tmp_path)
    for number in (1, 2, 3):
        shutil.copytree(sweep[0] / str(number), tmp_path / str(number))
        if number == 1:
            with pytest.raises(ValueError, match="is the only run"):
                read_runs(tmp_path)
    (tmp_path / "2" / "memorization_run.parquet").unlink()
    assert len(read_runs(tmp_path).mask) == 2
    assert "1 runs below" in caplog.text
    short = pd.read_parquet(tmp_path / "3" / "memorization_run.parquet").iloc[1:]
    short.to_parquet(tmp_path / "3" / "memorization_run.parquet")
    with pytest.raises(ValueError, match="lacks 1 samples"):
        read_runs(tmp_path)


def test_a_sweep_of_ours_can_be_reduced(tmp_path):
    root = write_noise(tmp_path / "images")
    options = [
        "method=finetune",
        "callbacks=memorization",
        "data.subset_ratio=0.5",
        "test=false",
        "trainer.max_epochs=1",
    ]
    parts = []
    for seed in range(3):
        folder = tmp_path / "sweep" / str(seed)
        run_tiny(folder, root, *options, "test=false", f"data.subset_seed={seed}")
        parts.append(pd.read_parquet(folder / "memorization_run.parquet").query("split == 'train'"))
    assert reduce_runs(tmp_path / "sweep", tmp_path / "out")["runs"] == 3
    table = pd.read_parquet(tmp_path / "out" / "memorization.parquet")
    mask, correct = (torch.tensor(np.stack([part[name] for part in parts])) for name in ("used", "correct"))
    np.testing.assert_allclose(table["memorization"], memorization(mask, correct).memorization)
    assert table["memorization"].notna().any()
