"""Matching as users meet it: a checkpoint for a reference, on any number of ranks, resumed and evaluated."""

import json
import shutil

import pandas as pd
import pytest
import torch

from lqf_lightning.evaluate import evaluate
from tiny import compose, run_tiny

EXACT = ("method=lqf_sgd", "method.ridge=0.3", "trainer.precision=64-true", "callbacks=[]", "test=false")
KERNEL = (*EXACT, "method.solver=kernel", "method.tradeoff={alpha: [0, 1], beta: [0, 5]}", "callbacks=tradeoff_curve")
CG = (*EXACT, "method.solver=cg", "method.tolerance=1e-9", "trainer.max_epochs=3")
SGD = (*EXACT, "method.solver=sgd", "trainer.max_epochs=1", "method.preconditioner=null", "method.optimizer.lr=0.5")
FEW = "data.shots=7"  # 21 samples in batches of 10: uneven shares


@pytest.fixture(scope="module")
def old(tmp_path_factory, folder_of_shapes):
    """A checkpoint of another network."""
    folder = tmp_path_factory.mktemp("old")
    learn = ("method=finetune", "method.optimizer.lr=0.05", "trainer.max_epochs=3", "seed=5")
    run_tiny(folder, folder_of_shapes, *learn, "callbacks=[]", "test=false")
    return folder / "checkpoints" / "last.ckpt"


def run_on(world_size, output, root, old, *overrides):
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world_size}", "trainer.strategy=ddp_fork"]
    return run_tiny(output, root, *(ranks if world_size > 1 else []), f"reference={old}", *overrides)


def checkpoint_of(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def apart(first, second):
    """Largest difference of dw, relative to its largest entry."""
    first, second = (checkpoint_of(folder)["state_dict"] for folder in (first, second))
    names = [name for name in first if ".dw." in name]
    scale = max(float(first[name].abs().max()) for name in names)
    return max(float((first[name] - second[name]).abs().max()) for name in names) / scale


@pytest.fixture(scope="module")
def single(tmp_path_factory, folder_of_shapes, old):
    """The runs in one process."""
    root = tmp_path_factory.mktemp("single")
    run_on(1, root / "kernel", folder_of_shapes, old, *KERNEL, FEW, "data.eval_batch_size=10")
    run_on(1, root / "cg", folder_of_shapes, old, *CG, FEW, "data.eval_batch_size=10")
    run_on(1, root / "sgd", folder_of_shapes, old, *SGD)
    return root


@pytest.mark.parametrize(
    ("name", "options", "world_size"),
    [
        ("kernel", (*KERNEL, FEW, "data.eval_batch_size=10"), 2),
        ("kernel", (*KERNEL, FEW, "data.eval_batch_size=10"), 3),
        ("sgd", SGD, 2),
    ],
)
def test_ranks_change_nothing(name, options, world_size, single, old, tmp_path, folder_of_shapes):
    metrics = run_on(world_size, tmp_path, folder_of_shapes, old, *options)
    assert apart(single / name, tmp_path) < 1e-7  # the reference has single precision, whose rounding batches change
    for key, value in json.loads((single / name / "metrics.json").read_text()).items():
        if not key.startswith("time/"):
            assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    if name == "kernel":
        own, expected = (pd.read_parquet(folder / "tradeoff_curve.parquet") for folder in (tmp_path, single / name))
        pd.testing.assert_frame_equal(own.drop(columns="relative_gradient"), expected.drop(columns="relative_gradient"))


def test_solvers_of_a_run_agree(single, old, tmp_path, folder_of_shapes):
    longer = ("method.solver=cg", "method.tolerance=1e-10", "trainer.max_epochs=60")
    run_on(1, tmp_path, folder_of_shapes, old, *EXACT, *longer, FEW, "data.eval_batch_size=10")
    assert apart(single / "kernel", tmp_path) < 1e-7


def test_the_tradeoff_holds_the_run_itself(single):
    table = pd.read_parquet(single / "kernel" / "tradeoff_curve.parquet")
    (row,) = table[table["chosen"]].to_dict("records")
    metrics = json.loads((single / "kernel" / "metrics.json").read_text())
    assert (row["alpha"], row["beta"]) == (1, 5)
    assert row["error"] == pytest.approx(1 - metrics["val/acc"], abs=1e-6)
    assert row["nfr"] - row["pfr"] == pytest.approx(row["error"] - row["reference_error"], abs=1e-12)
    assert (single / "kernel" / "pictures" / "tradeoff_curve.png").exists()


def test_an_interrupted_run_ends_with_the_same_bits(single, old, tmp_path, folder_of_shapes):
    options = (*CG, FEW, "data.eval_batch_size=10")
    crash = "+callbacks.crash={_target_: crash.CrashAtEpoch, epoch: 2}"
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_on(1, tmp_path, folder_of_shapes, old, *options, crash)
    run_on(1, tmp_path, folder_of_shapes, old, *options)
    assert apart(single / "cg", tmp_path) == 0


def test_evaluation_needs_no_reference(single, tmp_path, folder_of_shapes):
    copy = tmp_path / "run"
    shutil.copytree(single / "kernel", copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("reference: /", "reference: /nowhere/"))
    options = ("progress=none", "callbacks=[]", "split=val", f"paths.output_dir={tmp_path}/eval")
    checkpoint = f"checkpoint={copy}/checkpoints/last.ckpt"
    values = evaluate(compose(checkpoint, *options, "trainer.precision=64-true", name="eval"))
    written = json.loads((single / "kernel" / "metrics.json").read_text())
    assert values["val/loss"] == pytest.approx(written["val/loss"], rel=1e-6)
    assert "reference" not in checkpoint_of(copy)["hyper_parameters"]
