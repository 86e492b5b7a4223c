"""The callback in whole runs: on several ranks, interrupted, with every kind of method, and in W&B."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lqf_lightning.data import NoAugmentation
from old_models import write_noise
from tiny import run_tiny

NOTHING_TO_VALIDATE = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """27 training images, so that batches of 6 leave a rest."""
    return write_noise(tmp_path_factory.mktemp("noise") / "images")


def read(folder):
    return pd.read_parquet(folder / "learning_speed.parquet")


RUN = [
    "method=finetune", "callbacks=learning_speed", "callbacks.learning_speed.per_epoch=true", "test=false",
    "callbacks.learning_speed.top=2", "data.batch_size=6", "trainer.max_epochs=3", "method.batch_norm=frozen",
    "data.val_fraction=0",
]  # fmt: skip
RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork"]
STILL = [*RUN, "method.optimizer.lr=0", "data/augmentation=none"]  # then repeated samples cannot change training
EVERY_THREE_STEPS = ["checkpoints.last.save_on_train_epoch_end=false", "+checkpoints.last.every_n_train_steps=3"]
EVERY_FIVE_STEPS = [*EVERY_THREE_STEPS[:1], "+checkpoints.last.every_n_train_steps=5"]  # the last batch of an epoch
CRASH = "+callbacks.crash={_target_: methods.paired.CrashAtStep, step: 8}"


def same_results(folder, other, tolerance):
    epochs = [pd.read_parquet(run / "learning_speed").sort_values(["epoch", "index"]) for run in (folder, other)]
    for one, two in (map(read, (folder, other)), epochs):
        pd.testing.assert_frame_equal(
            one.reset_index(drop=True), two.reset_index(drop=True), rtol=tolerance, atol=tolerance
        )


@pytest.fixture(scope="module")
def still(tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("still")
    run_tiny(folder, root, *STILL)
    return folder


@pytest.mark.parametrize("world_size", [2, 3])
def test_samples_that_ranks_repeat_count_once(world_size, tmp_path, root, still):
    """Of 27 images and batches of 6, two ranks repeat one."""
    run_tiny(tmp_path, root, *STILL, *RANKS, f"trainer.devices={world_size}")
    assert read(tmp_path)["epochs"].tolist() == [3] * 27
    same_results(tmp_path, still, 1e-5)


def test_a_run_goes_on_in_the_middle_of_an_epoch_on_fewer_ranks(tmp_path, root, still):
    first = [*STILL, *EVERY_THREE_STEPS, *RANKS, "trainer.devices=2", "+trainer.max_steps=8"]
    run_tiny(tmp_path, root, *first)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    (kept,) = [entry for name, entry in state["callbacks"].items() if name.startswith("LearningSpeed")]
    assert (state["global_step"], kept["epoch"], kept["ledger"]["sums"][:, -1].sum()) == (6, 1, 6)
    run_tiny(tmp_path, root, *STILL, *EVERY_THREE_STEPS)
    same_results(tmp_path, still, 1e-5)


@pytest.mark.parametrize(
    ("saving", "evaluate"), [(EVERY_THREE_STEPS, "false"), (EVERY_FIVE_STEPS, "true")], ids=["middle", "end"]
)
def test_an_interrupted_run_ends_with_the_same_scores(saving, evaluate, tmp_path, root):
    options = [*RUN, "method.optimizer.lr=0.05", "data/augmentation=randaugment"]
    options.append(f"callbacks.learning_speed.evaluate={evaluate}")
    run_tiny(tmp_path / "whole", root, *options)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_tiny(tmp_path / "parts", root, *options, *saving, CRASH)
    assert not (tmp_path / "parts" / "learning_speed.parquet").exists()
    run_tiny(tmp_path / "parts", root, *options, *saving)
    same_results(tmp_path / "whole", tmp_path / "parts", 0)
    assert read(tmp_path / "whole")["epochs"].tolist() == [3] * 27
    (tmp_path / "parts" / "learning_speed.parquet").unlink()
    run_tiny(tmp_path / "parts", root, *options, *saving)  # nothing left to train
    same_results(tmp_path / "whole", tmp_path / "parts", 0)


METHODS = {
    "cg": (["method=lqf_sgd", "method.solver=cg", "method.acceleration=none", "method.tolerance=1e-6"], 27, 2),
    "kernel": (["method=lqf_sgd", "method.solver=kernel"], 27, 1),
    "fixmatch": (["method=fixmatch", "method.unlabeled_ratio=2", "data.labels_per_class=2"], 6, 2),
    "moco": (["method=moco", "method.queue_size=6", "data.labels_per_class=5"], 15, 2),
}


@NOTHING_TO_VALIDATE
@pytest.mark.parametrize("name", METHODS)
def test_labeled_samples_of_every_method_are_seen(name, tmp_path, root):
    options, number, epochs = METHODS[name]
    common = ["callbacks=learning_speed", "callbacks.learning_speed.top=1", "data.batch_size=6", "test=false"]
    metrics = run_tiny(tmp_path, root, *options, *common)
    table = read(tmp_path)
    assert len(table) == number
    assert table["epochs"].max() == epochs
    if name in ("cg", "kernel"):
        assert table["epochs"].min() == epochs
        assert table["final_correct"].mean() == pytest.approx(metrics["train/acc"])
        assert table["cumulative_correctness"].max() <= 1


def test_wandb_shows_the_hardest_and_the_easiest_images(tmp_path, root, wandb_runs):
    run_tiny(tmp_path / "run", root, *RUN, "method.optimizer.lr=0.05", "logger=wandb")
    import wandb

    wandb.finish()
    (run,) = wandb_runs()
    ordered = read(tmp_path / "run").sort_values(["cumulative_correctness", "cumulative_confidence"], kind="stable")
    for name, expected in (("hardest", ordered.head(2)), ("easiest", ordered.iloc[::-1].head(2))):
        table, files = run.table(f"train/learning_speed_{name}")
        assert table["columns"] == ["image", *ordered]
        for row, (_, sample) in zip(table["data"], expected.iterrows(), strict=True):
            assert row[1:5] == [sample["index"], sample["path"], sample["label"], sample["class"]]
            assert row[6:8] == pytest.approx([sample["cumulative_correctness"], sample["cumulative_confidence"]])
            shown = np.asarray(Image.open(files[row[0]["path"]]).convert("RGB"), dtype=int)
            own = np.asarray(NoAugmentation(32, 0.875)(Image.open(root / sample["path"])), dtype=int)
            assert np.abs(shown - own).max() <= 1
        assert run.picture(f"pictures/learning_speed_{name}").exists()
