"""Exact solvers as users meet them: run folders, resumption, loggers, callbacks and the evaluation of checkpoints."""

import json

import pandas as pd
import pytest
import torch

from lqf_lightning.evaluate import evaluate
from tiny import compose, run_tiny

CG = ("method=lqf_cg", "method.ridge=0.3", "trainer.precision=64-true", "method.tolerance=1e-9")
KERNEL = ("method=lqf_sgd", "method.solver=kernel", "method.ridge=0.3", "trainer.precision=64-true")


def checkpoint_of(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def weights_of(folder):
    return checkpoint_of(folder)["state_dict"]


def apart(first, second):
    """Largest difference of dw, relative to its largest entry."""
    names = [name for name in first if ".dw." in name]
    scale = max(float(first[name].abs().max()) for name in names)
    return max(float((first[name] - second[name]).abs().max()) for name in names) / scale


def run_on(world_size, output, root, *overrides):
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world_size}", "trainer.strategy=ddp_fork"]
    return run_tiny(output, root, *(ranks if world_size > 1 else []), *overrides)


def test_both_solvers_leave_all_that_a_run_promises_and_agree(tmp_path, folder_of_shapes):
    loggers = ("logger=csv", "callbacks=[learning_curves,linear_probe]")
    cg = run_tiny(tmp_path / "cg", folder_of_shapes, *CG, *loggers, "trainer.max_epochs=60")
    kernel = run_tiny(tmp_path / "kernel", folder_of_shapes, *KERNEL, *loggers, "trainer.max_epochs=60")
    assert apart(weights_of(tmp_path / "cg"), weights_of(tmp_path / "kernel")) < 1e-7
    assert cg["train/relative_gradient"] <= 1e-9
    for name in ("train/objective", "train/loss", "train/acc", "val/loss", "test/linear_probe_acc"):
        assert kernel[name] == pytest.approx(cg[name], rel=1e-5)
    rows = pd.read_csv(tmp_path / "cg" / "csv" / "metrics.csv").dropna(subset="train/objective")
    assert len(rows) == checkpoint_of(tmp_path / "cg")["global_step"] < 60
    assert rows["train/objective"].diff().max() <= 1e-6 * rows["train/objective"].iloc[0]  # logged in single precision
    assert rows["train/distance_bound"].iloc[-1] < 1e-6 * rows["train/distance_bound"].iloc[0]
    for name in ("cg", "kernel"):
        assert (tmp_path / name / "pictures" / "learning_curves.png").exists()


def evaluated(run, name, output):
    config = compose(
        f"checkpoint={run}/checkpoints/{name}.ckpt", "progress=none", "callbacks=[]", "split=test",
        f"paths.output_dir={output}", "trainer.precision=64-true", name="eval",
    )  # fmt: skip
    return evaluate(config)


@pytest.mark.parametrize("solver", [CG, KERNEL], ids=["cg", "kernel"])
def test_a_checkpoint_evaluates_to_the_numbers_of_its_run(solver, tmp_path, folder_of_shapes):
    run_tiny(tmp_path / "run", folder_of_shapes, *solver, "callbacks=[]", "trainer.max_epochs=3")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    values = evaluated(tmp_path / "run", "last", tmp_path / "eval")
    assert values == pytest.approx({name: written[name] for name in values}, rel=1e-6)
    assert "test/acc" in values


def test_what_is_tested_is_the_last_dw_and_not_the_best_on_validation(tmp_path, folder_of_shapes):
    other = "checkpoints.best.mode=max"  # some epoch before the last
    steps = ("method.acceleration=none", "trainer.max_epochs=4")
    run_tiny(tmp_path / "run", folder_of_shapes, *CG, *steps, "callbacks=[]", other)
    best, last = (checkpoint_of(tmp_path / "run", name) for name in ("best", "last"))
    assert best["epoch"] < last["epoch"] == 3
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())["test/loss"]
    at_best, at_last = (evaluated(tmp_path / "run", n, tmp_path / n)["test/loss"] for n in ("best", "last"))
    assert written == pytest.approx(at_last, rel=1e-6)
    assert abs(at_best - at_last) > 1e-3 * at_last


@pytest.mark.parametrize("ridge", ["0.3", "auto"])
def test_an_interrupted_run_ends_with_the_same_bits(ridge, tmp_path, folder_of_shapes):
    never = "method.tolerance=1e-6"  # in four epochs
    options = ("method=lqf_cg", f"method.ridge={ridge}", never, "trainer.max_epochs=4", "callbacks=learning_curves")
    run_tiny(tmp_path / "whole", folder_of_shapes, *options, "test=false")
    crash = "+callbacks.crash={_target_: crash.CrashAtEpoch, epoch: 2}"
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_tiny(tmp_path / "parts", folder_of_shapes, *options, crash)
    run_tiny(tmp_path / "parts", folder_of_shapes, *options, "test=false")
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert checkpoint_of(tmp_path / "parts")["ridge"] == checkpoint_of(tmp_path / "whole")["ridge"]


def test_wandb_has_one_row_per_iteration(tmp_path, folder_of_shapes, wandb_runs):
    import wandb

    run_tiny(tmp_path / "run", folder_of_shapes, *CG, "logger=wandb", "trainer.max_epochs=3")
    wandb.finish()
    (run,) = wandb_runs()
    assert len(run.series("train/objective")) == 3
    assert len(run.series("val/acc")) == 3


# 21 samples in batches of 10, so that shares are uneven; or three, so that one of four ranks has none.
COMMON = ("trainer.max_epochs=3", "callbacks=[]", "test=false", "data.eval_batch_size=10")
AUTO = (*CG, "method.ridge=auto")
ON_RANKS = {
    "cg": (*CG, *COMMON, "data.shots=7"),
    "kernel": (*KERNEL, *COMMON, "data.shots=7"),
    "few_cg": (*AUTO, *COMMON, "data.shots=1"),
    "few_kernel": (*KERNEL, *COMMON, "data.shots=1", "method.ridge=auto"),
}


@pytest.fixture(scope="module")
def single(tmp_path_factory, folder_of_shapes):
    """The same runs in one process."""
    root = tmp_path_factory.mktemp("single")
    for name, options in ON_RANKS.items():
        run_on(1, root / name, folder_of_shapes, *options)
    return root


@pytest.mark.parametrize(
    ("name", "world_size"), [("cg", 2), ("cg", 3), ("kernel", 2), ("few_cg", 4), ("few_kernel", 4)]
)
def test_weights_and_metrics_do_not_depend_on_the_number_of_ranks(name, world_size, single, tmp_path, folder_of_shapes):
    metrics = run_on(world_size, tmp_path, folder_of_shapes, *ON_RANKS[name])
    assert apart(weights_of(single / name), weights_of(tmp_path)) < 1e-10
    assert checkpoint_of(tmp_path)["ridge"] == pytest.approx(checkpoint_of(single / name)["ridge"], rel=1e-12)
    for key, value in json.loads((single / name / "metrics.json").read_text()).items():
        if not key.startswith("time/"):
            assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_a_run_goes_on_with_another_number_of_ranks(single, tmp_path, folder_of_shapes):
    run_on(2, tmp_path, folder_of_shapes, *ON_RANKS["cg"], "trainer.max_epochs=1")
    run_on(1, tmp_path, folder_of_shapes, *ON_RANKS["cg"], "trainer.max_epochs=2")
    run_on(3, tmp_path, folder_of_shapes, *ON_RANKS["cg"])
    assert apart(weights_of(single / "cg"), weights_of(tmp_path)) < 1e-10
