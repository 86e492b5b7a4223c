"""Jobs, sweeps and ranks as users start them: the console script, real processes, W&B read back."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from tiny import tiny_overrides

DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
WITH_TESTS = {"PYTHONPATH": str(Path(__file__).parent)}  # where crash.py lies
QUIET = ["callbacks=[]", "logger=wandb"]


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def last_weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_grid_sweep_runs_four_right_jobs_in_one_group(console, tmp_path, folder_of_shapes, wandb_runs):
    overrides = tiny_overrides(folder_of_shapes)
    console("lqf-train", "-m", "method=finetune,lqf", "seed=0,1", *overrides, *QUIET, "hydra.sweep.dir=sweep")

    runs = wandb_runs()
    assert len({run.id for run in runs}) == 4
    assert {run.group for run in runs} == {"sweep"}
    assert [run.exit_code for run in runs] == [0] * 4
    jobs = {(run.config["method"]["_target_"].rpartition(".")[2], run.config["seed"]): run for run in runs}
    assert set(jobs) == {("Finetune", 0), ("Finetune", 1), ("LQF", 0), ("LQF", 1)}
    for (method, _), run in jobs.items():
        written = metrics_of(run.folder.parent.parent)
        assert run.series("val/acc")[-1] == pytest.approx(written["val/acc"])
        assert len(run.series("val/acc")) == {"Finetune": 2, "LQF": 1}[method]  # so few images are solved at once
    heads = [last_weights(tmp_path / "sweep" / str(job))["model.fc.weight"] for job in (0, 1)]
    assert not torch.equal(*heads)  # another seed is another head


def test_two_real_ranks_agree_with_one(console, tmp_path, folder_of_shapes, wandb_runs):
    options = ["method=lqf_sgd", "method/optimizer=sgd", *tiny_overrides(folder_of_shapes), "method.optimizer.lr=1e-4"]
    console("lqf-train", *options, *QUIET, "hydra.run.dir=one")
    console("lqf-train", *options, *QUIET, *DDP, "trainer.max_epochs=2", "hydra.run.dir=two")
    one, two = last_weights(tmp_path / "one"), last_weights(tmp_path / "two")
    for name in one:
        scale = one[name].double().abs().max().clamp(min=1e-3)
        assert (one[name].double() - two[name].double()).abs().max() <= 1e-5 * scale, name
    single, many = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert many["test/acc"] == single["test/acc"]
    assert many["val/loss"] == pytest.approx(single["val/loss"], rel=1e-5)
    assert sorted((run.folder.parent.parent.name, run.exit_code) for run in wandb_runs()) == [("one", 0), ("two", 0)]


def test_sweep_over_real_ranks_goes_on_after_a_failed_job(console, tmp_path, folder_of_shapes, wandb_runs):
    done = console(
        "lqf-train", "-m", "method=lqf_sgd", "method.optimizer.lr=0.001,inf,0.002",
        *tiny_overrides(folder_of_shapes)[:-1],
        *QUIET, *DDP, "trainer.max_epochs=2", "hydra.sweep.dir=sweep", check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "training diverged" in done.stdout + done.stderr
    finished = [(tmp_path / "sweep" / str(job) / "metrics.json").exists() for job in range(3)]
    assert finished == [True, False, True]
    exits = {run.folder.parent.parent.name: run.exit_code for run in wandb_runs()}
    assert exits == {"0": 0, "1": 1, "2": 0}
    rates = [OmegaConf.load(tmp_path / "sweep" / str(job) / "config.yaml").method.optimizer.lr for job in (0, 2)]
    assert rates == [0.001, 0.002]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_failing_rank_ends_the_run(rank, console, tmp_path, folder_of_shapes):
    crash = f"+callbacks.crash={{_target_: crash.CrashAtEpoch, epoch: 1, rank: {rank}}}"
    done = console(
        "lqf-train", "method=finetune", *tiny_overrides(folder_of_shapes), *DDP, "trainer.max_epochs=2", "logger=csv",
        "callbacks=[]", crash, "hydra.run.dir=run", check=False, timeout=120, env=WITH_TESTS,
    )  # fmt: skip
    assert done.returncode != 0
    assert "pulled the plug" in done.stdout + done.stderr
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()  # the first epoch is not lost


def test_a_failed_run_is_marked_in_wandb_and_keeps_its_curves(console, tmp_path, folder_of_shapes, wandb_runs):
    done = console(
        "lqf-train", "method=lqf_sgd", *tiny_overrides(folder_of_shapes), "logger=wandb", "callbacks=[]",
        "+callbacks.crash={_target_: crash.CrashAtEpoch, epoch: 1}", "hydra.run.dir=run", check=False,
        env=WITH_TESTS,
    )  # fmt: skip
    assert done.returncode == 1
    (run,) = wandb_runs()
    assert run.exit_code == 1
    assert len(run.series("val/acc")) == 1


def test_wandb_holds_config_curves_and_pictures(console, tmp_path, folder_of_shapes, wandb_runs):
    console("lqf-train", "method=lqf_sgd", *tiny_overrides(folder_of_shapes), "logger=[wandb,csv]", "hydra.run.dir=run")
    (run,) = wandb_runs()
    assert run.project == "lqf-lightning"
    keys = {key for key in run.config if not key.startswith("_wandb")}
    written = OmegaConf.to_container(OmegaConf.load(tmp_path / "run" / "config.yaml"))
    assert keys == set(written)  # nested as the user wrote it, once, and nothing flattened beside it
    assert run.config["method"] == written["method"]
    rows = pd.read_csv(tmp_path / "run" / "csv" / "metrics.csv")
    assert run.series("val/loss") == pytest.approx(rows["val/loss"].dropna().tolist())
    for name in ("learning_curves", "confusion"):
        assert run.picture(f"pictures/{name}").read_bytes() == (tmp_path / f"run/pictures/{name}.png").read_bytes()


def test_resumed_run_continues_its_wandb_run(console, tmp_path, folder_of_shapes, wandb_runs):
    options = ["lqf-train", "method=finetune", *tiny_overrides(folder_of_shapes), *QUIET, "hydra.run.dir=run"]
    console(*options, "trainer.max_epochs=1")
    console(*options, "trainer.max_epochs=2")
    runs = wandb_runs()
    assert len({run.id for run in runs}) == 1
    assert [row["epoch"] for run in runs for row in run.history if "val/acc" in row] == [0, 1]


def test_evaluation_gives_the_numbers_of_the_run(console, tmp_path, folder_of_shapes):
    console("lqf-train", "method=lqf_sgd", *tiny_overrides(folder_of_shapes), "logger=csv", "hydra.run.dir=run")
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    done = console("lqf-eval", f"checkpoint={best}", "progress=none", "hydra.run.dir=eval")
    said = done.stdout + done.stderr
    trained, evaluated = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "eval")
    names = [name for name in evaluated if name.startswith("test/")]
    assert len(names) >= 6
    assert [evaluated[name] for name in names] == pytest.approx([trained[name] for name in names])
    assert (tmp_path / "eval" / "pictures" / "confusion.png").exists()
    assert f"evaluating {best}" in said

    wrong = console("lqf-eval", "checkpoint=run/checkpoints/bset.ckpt", check=False)
    assert wrong.returncode != 0
    assert "best.ckpt" in wrong.stdout + wrong.stderr
