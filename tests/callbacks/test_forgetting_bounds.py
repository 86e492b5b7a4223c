import json

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lqf_lightning.callbacks.forgetting_bounds import ForgettingBounds
from lqf_lightning.callbacks.forgetting_pictures import draw_forgetting

from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.folder_source import FolderSource
from lqf_lightning.methods import LQF, Finetune
from methods.dense_lqf import ALPHA, EXACT, SGD
from methods.tensors import TensorData, build_backbone, build_trainer, draw, fit_on, snapshot
from tiny import run_tiny

COHORTS = {"few": [3, 9, 14], "greens": {"class": "green"}}
NATS = ["weights_nats", "intercept_nats", "least_nats", "outputs_nats", "cohort_outputs_nats"]
NAME = "callbacks.forgetting_bounds"


def train(root, folder, *, epochs=3, callback=True, resume=None, trainer=None, **options):
    """A network of a few dozen weights, in double precision."""
    data = ImageDataModule(FolderSource(root), image_size=6, batch_size=6, num_workers=0)
    data.normalization = ((0.5,) * 3, (0.5,) * 3)
    options = {"optimizer": SGD, "target_scale": ALPHA, "ridge": 0.02, "normalize_step": False, **options}
    method = LQF(build_backbone(), ["blue", "green", "red"], **options)
    callbacks = [ForgettingBounds(COHORTS, sigma=0.1, queries=3)] if callback else []
    runner = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[*callbacks, ModelCheckpoint(folder, save_last=True)],
        default_root_dir=folder, precision="64-true", num_sanity_val_steps=0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **(trainer or {"devices": 1}),
    )  # fmt: skip
    fit_on(runner, method, data, ckpt_path=resume)
    return method, runner


def read(folder):
    return pd.read_parquet(folder / "forgetting_bounds.parquet"), json.loads(
        (folder / "forgetting_bounds.json").read_text()
    )


def last(table, cohort):
    return table[table["cohort"] == cohort].iloc[-1]


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory, folder_of_shapes):
    folder = tmp_path_factory.mktemp("sgd")
    return folder, *train(folder_of_shapes, folder, preconditioner=EXACT, epochs=2)


def test_there_is_a_row_at_the_start_and_after_every_validation(stochastic):
    folder, _, trainer = stochastic
    table, report = read(folder)
    assert table["step"].tolist() == [0, 0, 0, 4, 4, 4, 8, 8, 8]
    assert table["cohort"].tolist() == 3 * ["nothing", "few", "greens"]
    assert table.loc[table["step"] > 0, "accuracy"].notna().all()
    for name in ("few", "greens"):
        row = last(table, name)
        assert 0 < row["outputs_nats"] <= row["weights_nats"]
        for key in NATS:
            assert float(trainer.callback_metrics[f"forget/{name}/{key}"]) == pytest.approx(row[key], rel=1e-6)
    assert {name: row["number"] for name, row in report["cohorts"].items()} == {"few": 3, "greens": 8}
    assert report["cohorts"]["greens"]["asked"] == "class green"
    assert (folder / "pictures" / "forgetting_bounds.png").stat().st_size > 10_000
    assert not (folder / "forgetting_bounds_kernel").exists()


@pytest.mark.parametrize("options", [{"solver": "kernel"}, {"solver": "cg", "tolerance": 1e-6, "acceleration": "none"}])
def test_a_finished_model_holds_what_was_foretold(options, tmp_path, folder_of_shapes):
    train(folder_of_shapes, tmp_path, epochs=60, **options)
    table, report = read(tmp_path)
    assert last(table, "nothing")["weights_nats"] < 1e-6 * last(table, "few")["weights_nats"]
    for name, row in report["cohorts"].items():
        assert last(table, name)["weights_nats"] == pytest.approx(row["optimum_nats"], rel=1e-3)
        assert last(table, name)["accuracy"] == pytest.approx(row["accuracy"] + row["accuracy_cost"])
        assert row["scrub_steps"] == len(row["scrub_curve"]) - 1 > 0
        assert row["scrub_curve"][-1] <= 1e-3 < row["scrub_curve"][-2]
        assert row["scrub_passes"] == pytest.approx(1.2 * (row["scrub_steps"] + 2) + 0.4)  # the last point anew
        sweeps = 2 * (row["scrub_steps"] + 2) * (24 - row["number"]) / 24
        assert row["scrub_seconds"] == pytest.approx(sweeps * report["sweep_seconds"])


def test_training_is_what_it_is_without(stochastic, tmp_path, folder_of_shapes):
    _, watched, _ = stochastic
    alone, _ = train(folder_of_shapes, tmp_path, callback=False, preconditioner=EXACT, epochs=2)
    one, other = snapshot(watched), snapshot(alone)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_an_interrupted_run_goes_on_with_its_curves(stochastic, tmp_path, folder_of_shapes):
    folder, _, _ = stochastic
    train(folder_of_shapes, tmp_path, preconditioner=EXACT, epochs=1)
    train(folder_of_shapes, tmp_path, preconditioner=EXACT, epochs=2, resume=tmp_path / "last.ckpt")
    resumed, whole = read(tmp_path)[0], read(folder)[0]
    assert resumed[["step", "cohort"]].equals(whole[["step", "cohort"]])
    np.testing.assert_allclose(resumed[NATS], whole[NATS], rtol=1e-9)


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_find_what_one_does(ranks, tmp_path, folder_of_shapes):
    train(folder_of_shapes, tmp_path / "one", epochs=1, solver="kernel")
    more = {"strategy": "ddp_fork", "devices": ranks}
    train(folder_of_shapes, tmp_path / "more", epochs=1, solver="kernel", trainer=more)
    (one, first), (other, second) = read(tmp_path / "one"), read(tmp_path / "more")
    assert one[["step", "cohort"]].equals(other[["step", "cohort"]])
    known = one["cohort"] != "nothing"  # at the optimum the rest is rounding
    np.testing.assert_allclose(other.loc[known, NATS], one.loc[known, NATS], rtol=1e-6)
    for name, row in first["cohorts"].items():
        for key, value in row.items():
            if key not in ("scrub_seconds", "relative_gradient", "distance_bound"):
                expected = pytest.approx(value, rel=1e-6) if isinstance(value, (float, list)) else value
                assert second["cohorts"][name][key] == expected, key


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cohorts": {}}, r"at least one cohort, got \{\}\. Set callbacks\.forgetting_bounds\.cohorts="),
        ({"cohorts": {"nothing": [1]}}, "'nothing' cannot be the name"),
        ({"cohorts": {"a/b": [1]}}, "'a/b' cannot be the name"),
        ({"cohorts": {1: [1], "1": [2]}}, "two cohorts have the same name"),
        ({"sigma": 0.0}, r"`sigma` must be positive and finite, got 0\.0\. Set callbacks\.forgetting_bounds\.sigma="),
        ({"queries": 2.5}, "`queries` must be a whole number, got 2.5"),
        ({"tolerance": -1.0}, "`tolerance` must be positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        ForgettingBounds(**options)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            {"class": "pink"},
            r"cohorts\.odd: .*no class is called pink.*Set callbacks\.forgetting_bounds\.cohorts\.odd",
        ),
        ({"fraction": 0.01}, r"cohorts\.odd: .*empty"),
        ([1, 2, 500], r"cohorts\.odd: .*500"),
        ("all", r"cohorts\.odd: .*nothing would be left"),
    ],
)
def test_cohorts_that_cannot_be_forgotten_are_refused_before_the_first_batch(spec, text, tmp_path, folder_of_shapes):
    data = ImageDataModule(FolderSource(folder_of_shapes), image_size=6, num_workers=0)
    data.normalization = ((0.5,) * 3, (0.5,) * 3)
    method = LQF(build_backbone(), ["blue", "green", "red"], optimizer=SGD, solver="kernel")
    trainer = build_trainer(1, ForgettingBounds({"odd": spec}), default_root_dir=tmp_path, precision="64-true")
    with pytest.raises(ValueError, match=text):
        fit_on(trainer, method, data)
    assert trainer.global_step == 0


def test_models_that_are_not_linear_and_losses_that_are_not_squared_are_refused(folder_of_shapes):
    classes = ["blue", "green", "red"]
    for method, text in (
        (Finetune(build_backbone(), classes, optimizer=SGD), r"got Finetune\. Set method=lqf"),
        (LQF(build_backbone(), classes, optimizer=SGD, loss="cross_entropy"), r"Set method\.loss=squared"),
    ):
        data = ImageDataModule(FolderSource(folder_of_shapes), image_size=6, num_workers=0)
        with pytest.raises(ValueError, match=text):
            fit_on(build_trainer(1, ForgettingBounds(COHORTS)), method, data)


def test_data_without_a_manifest_are_refused():
    method = LQF(build_backbone(), ["ant", "bee", "cat"], optimizer=SGD)
    with pytest.raises(TypeError, match="need an ImageDataModule"):
        fit_on(build_trainer(1, ForgettingBounds(COHORTS)), method, TensorData(*draw(9)))


def test_the_picture_shows_every_cohort(stochastic):
    table, report = read(stochastic[0])
    figure = draw_forgetting(table, report["cohorts"], 0.1)
    weights, answers, scrubs = figure.axes
    labels = [axes.get_legend_handles_labels()[1] for axes in (weights, answers, scrubs)]
    assert labels[0] == ["unfinished training", "few (3)", "greens (8)"]
    assert len(labels[1]) == 4
    assert labels[2][1].startswith("greens: accuracy -")
    shown = weights.get_lines()[labels[0].index("few (3)")].get_ydata()
    assert list(shown) == table.loc[table["cohort"] == "few", "weights_nats"].tolist()


def test_forecast_starts_below_the_gradient_of_the_untrained_model(tmp_path, folder_of_shapes):
    cohorts = f"{NAME}.cohorts={{greens: {{class: green}}}}"
    options = ["method=lqf_sgd", "callbacks=[forgetting_bounds]", cohorts, "trainer.max_epochs=1", "test=false"]
    run_tiny(tmp_path, folder_of_shapes, *options, "method.ridge=1e-7")
    _, report = read(tmp_path)
    assert report["cohorts"]["greens"]["scrub_curve"][0] < 1  # what the samples leave is less than there was to learn


@pytest.mark.gpu
def test_bounds_under_ddp_with_nccl_are_those_of_the_cpu(tmp_path, folder_of_shapes):
    options = [
        "method=lqf_sgd", "method.solver=kernel", "method.ridge=0.1", "callbacks=[forgetting_bounds]", "test=false",
        f"{NAME}.cohorts={{few:[3,9,14],greens:{{class:green}}}}", "trainer.max_epochs=1",
    ]  # fmt: skip
    nccl = [
        "trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=1", "+trainer.strategy.process_group_backend=nccl",
    ]  # fmt: skip
    for name, more in (("cpu", []), ("gpu", nccl)):
        run_tiny(tmp_path / name, folder_of_shapes, *options, *more)
    (one, first), (other, second) = read(tmp_path / "cpu"), read(tmp_path / "gpu")
    known = one["cohort"] != "nothing"
    for column in ("weights_nats", "outputs_nats", "cohort_outputs_nats"):
        np.testing.assert_allclose(other.loc[known, column], one.loc[known, column], rtol=1e-2)
    for name, row in first["cohorts"].items():
        assert second["cohorts"][name]["optimum_nats"] == pytest.approx(row["optimum_nats"], rel=1e-2)
        assert abs(second["cohorts"][name]["scrub_steps"] - row["scrub_steps"]) <= 1
