import json

import pandas as pd
import pytest
import torch

from lqf_lightning.evaluate import evaluate
from tiny import compose, run_tiny, write_shapes

OPTIONS = {
    "finetune": ["method=finetune", "method.batch_norm=frozen"],
    "lqf": ["method=lqf_sgd", "method/optimizer=sgd", "method.optimizer.lr=1e-4"],  # adaptive steps amplify rounding
    "lqf-kfac": [
        "method=lqf_sgd", "method/preconditioner=kfac", "method.preconditioner.cotangents=exact",
        "method/optimizer=sgd",
        "method.optimizer.lr=0.01", "method.layers=[head]", "method.preconditioner.relative_floor=0.1",
    ],
}  # fmt: skip


def run_on(world_size, output, root, *overrides):
    """One tiny run on forked ranks; forking is what makes these tests fast."""
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world_size}", "trainer.strategy=ddp_fork"]
    return run_tiny(output, root, *(ranks if world_size > 1 else []), "trainer.max_epochs=2", *overrides)


# Rounding of the gradient, amplified by the condition of the preconditioner.
TOLERANCE = {"finetune": 1e-5, "lqf": 1e-5, "lqf-kfac": 1e-4}


@pytest.fixture(scope="module", params=OPTIONS)
def runs(request, tmp_path_factory, folder_of_shapes):
    """The same run on one, two and three ranks: 24 training samples in batches of 12, 11 and 13 to evaluate."""
    root = tmp_path_factory.mktemp("ranks")
    for world_size in (1, 2, 3):
        run_on(world_size, root / str(world_size), folder_of_shapes, *OPTIONS[request.param])
    return root, TOLERANCE[request.param]


@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_do_not_depend_on_the_number_of_ranks(runs, world_size):
    root, tolerance = runs

    def weights(size):
        return torch.load(root / str(size) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    single, many = weights(1), weights(world_size)
    assert single.keys() == many.keys()
    for name in single:
        scale = single[name].double().abs().max().clamp(min=1e-3)
        assert (single[name].double() - many[name].double()).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("world_size", [2, 3])
def test_metrics_do_not_depend_on_the_number_of_ranks(runs, world_size):
    root, tolerance = runs
    single, many = (json.loads((root / str(size) / "metrics.json").read_text()) for size in (1, world_size))
    assert single.keys() == many.keys()
    assert len([name for name in single if name.startswith(("val/", "test/"))]) >= 14
    for name, value in single.items():
        if not name.startswith("time/"):
            assert many[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name


def test_ranks_without_a_sample_neither_hang_nor_count(tmp_path):
    root = tmp_path / "images"
    write_shapes(root / "train", per_class=4, seed=0)
    write_shapes(root / "val", per_class=1, seed=1)
    write_shapes(root / "test", per_class=1, seed=2)
    options = ("method=lqf_sgd", "method/optimizer=sgd", "method.optimizer.lr=1e-4")
    metrics = {size: run_on(size, tmp_path / str(size), root, *options) for size in (1, 4)}  # three samples, four ranks
    keys = [name for name in metrics[1] if name.startswith(("val/", "test/"))]
    assert [metrics[4][k] for k in keys] == pytest.approx([metrics[1][k] for k in keys], rel=1e-5, abs=1e-6)


def test_batch_statistics_are_those_of_rank_zero_at_evaluation(tmp_path, folder_of_shapes):
    metrics = run_on(2, tmp_path, folder_of_shapes, "method=finetune", "callbacks=[]")
    for split, checkpoint in (("val", "last"), ("test", "best")):
        config = compose(
            f"checkpoint={tmp_path}/checkpoints/{checkpoint}.ckpt", f"split={split}", "progress=none", "callbacks=[]",
            f"paths.output_dir={tmp_path}/{split}", name="eval",
        )  # fmt: skip
        assert evaluate(config)[f"{split}/loss"] == pytest.approx(metrics[f"{split}/loss"], rel=1e-5)


def test_one_wandb_run_whatever_the_number_of_ranks(tmp_path, folder_of_shapes, wandb_runs):
    import wandb

    run_on(2, tmp_path / "run", folder_of_shapes, "method=lqf_sgd", "logger=wandb")
    wandb.finish()
    (run,) = wandb_runs()
    assert len(run.series("val/acc")) == 2
    assert pd.notna(run.series("test/acc")[0])
