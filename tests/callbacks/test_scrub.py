"""The callback in a training, and its options; what it computes is tested with the command."""

import json

import pytest
import torch
import wandb

from lqf_lightning.analysis.scrub_options import ScrubOptions
from tiny import run_tiny

LQF = ("method=lqf_cg", "method.ridge=0.1", "method.tolerance=1e-6", "trainer.max_epochs=80", "test=false")
SCRUB = (
    "callbacks=[scrub]",
    "callbacks.scrub.cohort=[1,7]",
    "callbacks.scrub.relearn=false",
    "callbacks.scrub.shadows=0",
)


def state(folder, name):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def test_training_is_what_it_was_and_the_scrubbed_model_lies_beside_it(folder_of_shapes, tmp_path):
    run_tiny(tmp_path / "plain", folder_of_shapes, *LQF, "callbacks=[]")
    run_tiny(
        tmp_path / "run", folder_of_shapes, *LQF, *SCRUB, "callbacks.scrub.noise=none", "callbacks.scrub.name=kernel"
    )
    plain, own = state(tmp_path / "plain", "last"), state(tmp_path / "run", "last")
    assert all(torch.equal(plain[name], own[name]) for name in plain)
    scrubbed, report = state(tmp_path / "run", "scrubbed"), json.loads((tmp_path / "run" / "scrub.json").read_text())
    moved = sum(float((scrubbed[name] - own[name]).double().square().sum()) for name in own)
    assert moved**0.5 == pytest.approx(report["scrub"]["weight_change"], rel=1e-5)
    assert report["scrub"]["verified_relative_gradient"] < 1e-5 < 1e-3 < report["scrub"]["relative_gradient_before"]
    assert report["read_outs"]["models"]["scrubbed"]["tug_of_war"] == pytest.approx(1, abs=1e-9)


def test_numbers_reach_the_loggers(folder_of_shapes, tmp_path, wandb_runs):
    run_tiny(tmp_path / "run", folder_of_shapes, *LQF, *SCRUB, "logger=wandb")
    wandb.finish()
    (run,) = wandb_runs()
    report = json.loads((tmp_path / "run" / "scrub.json").read_text())
    assert run.series("forget/nats") == [pytest.approx(report["bound"]["nats"])]
    assert run.series("forget/scrubbed_test_error") == [report["read_outs"]["models"]["scrubbed"]["test_error"]]


def test_fine_tuned_network_keeps_its_noise_to_itself(folder_of_shapes, tmp_path):
    options = ["method=finetune", "test=false", *SCRUB, "callbacks.scrub.name=fisher"]
    run_tiny(tmp_path / "run", folder_of_shapes, *options, "++callbacks.scrub.options.strength=1e-8")
    report = json.loads((tmp_path / "run" / "scrub.json").read_text())
    assert report["scrub"]["noise"] is None
    assert report["bound"]["nats"] is None
    assert report["scrub"]["weight_change"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["method=lqf_sgd", "callbacks.scrub.name=fisher"], "no scrub of LQF"),
        (["method=finetune", "callbacks.scrub.name=kernel"], "no scrub of Finetune"),
        (["method=lqf_sgd", "callbacks.scrub.cohort=[5000]"], "5000"),
        (["method=lqf_sgd", "callbacks.scrub.sigma=0"], "sigma"),
        (["method=lqf_sgd", "callbacks.scrub.noise=pink"], "noise"),
        (["method=lqf_sgd", "callbacks.scrub.shadows=3"], "shadows"),
    ],
)
def test_wrong_requests_fail_before_the_first_batch(folder_of_shapes, tmp_path, options, words):
    with pytest.raises(Exception, match=words):
        run_tiny(tmp_path / "run", folder_of_shapes, *SCRUB, *options)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_two_models_to_compare_with_are_one_too_many():
    with pytest.raises(ValueError, match=r"callbacks\.scrub\.retrain=false"):
        ScrubOptions(retrain=True, retrained="other.ckpt")
