import logging
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers import WandbLogger
from lqf_lightning.callbacks import LearnedPenalty
from lqf_lightning.callbacks.learned_penalty import draw_penalty, tabulate_penalty

from lqf_lightning.linear import learned_penalty
from lqf_lightning.methods import LQF, Finetune
from lqf_lightning.methods.solvers.outlook import Outlook
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from ranks import run_on_ranks
from tiny import run_tiny

GROUPS = {
    "stem": ("conv1.weight", "bn1.weight", "bn1.bias"),
    "stage1": ("conv2.weight", "bn2.weight", "bn2.bias"),
    "head": ("fc.weight", "fc.bias"),
}
SIZES = {"conv1.weight": 54, "bn1.weight": 2, "bn1.bias": 2, "conv2.weight": 54, "bn2.weight": 3, "bn2.bias": 3}
SIZES |= {"fc.weight": 9, "fc.bias": 3}
COLUMNS = ("group", "first_layer", "parameters", "scale", "ridge_factor", "share_before", "share_after")
NOTHING = "no learned penalty"


class SweptData(TensorData):
    """Exact solvers ask for one sweep over the samples in order, which these are in anyway."""

    sweeps = 0


class Settles(Callback):
    """Has a penalty learned before the first step, as the method would."""

    def on_fit_start(self, trainer, pl_module):
        for name, value in vars(settled()).items():
            setattr(pl_module, name, value)


class Fails(Callback):
    """Ends the run at the first step, or before anything was settled."""

    def __init__(self, hook):
        setattr(self, hook, self._fail)

    def _fail(self, *arguments):
        raise RuntimeError("on purpose")


def synthetic(steps=4, step=2):
    """Mean diagonals 1, 3, 4 with scales 4, 1, 1/4, listed in another order than that of the layers."""
    return learned_penalty.LearnedPenalty(
        scales={"head": 0.25, "stem": 4.0, "stage1": 1.0},
        ridge=2.0,
        relative_ridge=0.25,
        temperature=3.0,
        loss=torch.tensor([2.0, 1.5, 1.0, 1.25], dtype=torch.float64)[:steps],
        accuracy=torch.tensor([0.25, 0.5, 0.75, 0.625], dtype=torch.float64)[:steps],
        share={"head": 1 / 8, "stem": 4 / 8, "stage1": 3 / 8},
        step=step,
    )


def settled(form="full", probe=0.375):
    outlook = None if probe is None else Outlook(probe, 0.75, True, "either", "words")
    return SimpleNamespace(learned_penalty=synthetic(), penalty_form=form, penalty_groups=GROUPS, outlook=outlook)


def train(folder, *callbacks, method=LQF, **options):
    trainer = build_trainer(1, *callbacks, default_root_dir=folder)
    built = method(build_backbone(), CLASSES, optimizer=SGD, **options)
    fit_on(trainer, built, SweptData(*draw(7)))
    return trainer


def lines(caplog):
    return [record.getMessage() for record in caplog.records if NOTHING in record.getMessage()]


def test_the_table_holds_every_group_from_the_first_layers_to_the_last():
    table = tabulate_penalty(synthetic(), GROUPS, SIZES)
    assert tuple(table.columns) == COLUMNS
    assert table["group"].tolist() == ["stem", "stage1", "head"]
    assert table["first_layer"].tolist() == ["conv1", "conv2", "fc"]
    assert table["parameters"].tolist() == [58, 60, 12]
    assert table["scale"].tolist() == [4.0, 1.0, 0.25]
    assert table["ridge_factor"].tolist() == [0.25, 1.0, 4.0]
    np.testing.assert_allclose(table["share_before"], [1 / 8, 3 / 8, 4 / 8], rtol=1e-12)
    np.testing.assert_allclose(table["share_after"], [4 / 8, 3 / 8, 1 / 8], rtol=1e-12)


def test_the_picture_shows_layers_by_depth_and_the_course_of_the_learning():
    figure = draw_penalty(tabulate_penalty(synthetic(), GROUPS, SIZES), synthetic(), exact=True, probe=0.375)
    layers, loss, accuracy = figure.axes
    learned, equal = ([bar.get_width() for bar in bars] for bars in layers.containers)
    np.testing.assert_allclose(learned, [4 / 8, 3 / 8, 1 / 8], rtol=1e-12)
    np.testing.assert_allclose(equal, [1 / 8, 3 / 8, 4 / 8], rtol=1e-12)
    assert [label.get_text() for label in layers.get_yticklabels()] == ["stem", "stage1", "head"]
    bottom, top = layers.get_ylim()
    assert bottom > 2 and top < 0  # noqa: PT018  # one statement: the first group is at the top
    for axes, values in ((loss, [2.0, 1.5, 1.0, 1.25]), (accuracy, [0.25, 0.5, 0.75, 0.625])):
        curve, mark = axes.get_lines()[:2]
        assert list(curve.get_xdata()) == [0, 1, 2, 3]
        assert list(curve.get_ydata()) == values
        assert set(mark.get_xdata()) == {2}
    assert set(accuracy.get_lines()[2].get_ydata()) == {0.375}


@pytest.mark.parametrize(("exact", "there", "absent"), [(True, "exact", "surrogate"), (False, "surrogate", "exact")])
def test_the_title_says_what_the_penalty_was_learned_on(exact, there, absent):
    title = draw_penalty(tabulate_penalty(synthetic(), GROUPS, SIZES), synthetic(), exact=exact).get_suptitle()
    assert there in title
    assert absent not in title


def test_long_names_and_learning_of_one_step_are_drawn(tmp_path):
    names = {f"stage{number}.{'a_block_of_a_long_name.' * 2}{number}": ("a.weight",) for number in range(20)}
    penalty = synthetic(steps=1, step=0)
    shares = dict.fromkeys(names, 1.0)
    many = learned_penalty.LearnedPenalty(shares, 1.0, 0.1, 1.0, penalty.loss, penalty.accuracy, shares, 0)
    figure = draw_penalty(tabulate_penalty(many, names, {"a.weight": 1}), many, exact=False)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(shown)) == 20
    assert max(len(name) for name in shown) <= 28
    figure.savefig(tmp_path / "picture.png")  # warnings of the layout are errors


def test_steps_that_could_not_be_solved_leave_a_gap(tmp_path):
    full = synthetic()
    full.loss[0], full.accuracy[0] = math.inf, math.nan
    figure = draw_penalty(tabulate_penalty(full, GROUPS, SIZES), full, exact=True)
    figure.savefig(tmp_path / "picture.png")
    for axes in figure.axes[1:]:
        assert all(math.isfinite(limit) for limit in (*axes.get_xlim(), *axes.get_ylim()))


def test_a_run_writes_its_penalty_and_reports_what_leave_one_out_promises(tmp_path):
    trainer = train(tmp_path, Settles(), LearnedPenalty(), solver="kernel", ridge=0.1)
    written = pd.read_parquet(tmp_path / "learned_penalty.parquet")
    sizes = {name: size for name, size in SIZES.items() if name in dict(trainer.lightning_module.linearized.deltas)}
    pd.testing.assert_frame_equal(written, tabulate_penalty(synthetic(), GROUPS, sizes))
    assert (tmp_path / "pictures" / "learned_penalty.png").stat().st_size > 1000
    promised = {"train/loo_acc": 0.75, "train/loo_loss": 1.0, "train/probe_loo_acc": 0.375}
    assert {name: float(trainer.callback_metrics[name]) for name in promised} == promised


def test_the_probe_is_reported_only_where_it_is_known(tmp_path, monkeypatch):
    known = settled(probe=None)
    monkeypatch.setitem(globals(), "settled", lambda: known)
    trainer = train(tmp_path, Settles(), LearnedPenalty(), solver="kernel", ridge=0.1)
    assert float(trainer.callback_metrics["train/loo_acc"]) == 0.75
    assert "train/probe_loo_acc" not in trainer.callback_metrics


@pytest.mark.parametrize("options", [{"solver": "kernel", "ridge": 0.1}, {"method": Finetune}])
def test_a_run_without_a_learned_penalty_says_so_and_goes_on(options, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = train(tmp_path, LearnedPenalty(), **options)
    (line,) = lines(caplog)
    assert "method.metric=learned" in line
    assert list(tmp_path.iterdir()) == []
    assert not any("loo" in name for name in trainer.callback_metrics)


def test_a_penalty_that_nothing_could_judge_is_not_shown_as_a_learned_one(folder_of_shapes, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run_tiny(tmp_path, folder_of_shapes, "method=lqf", "data.shots=1", "callbacks=[learned_penalty]", "test=false")
    (line,) = lines(caplog)
    assert "two training images of a class" in line
    assert not list(tmp_path.rglob("learned_penalty.*"))


def test_a_penalty_of_an_earlier_start_is_named_as_such(tmp_path, caplog):
    (tmp_path / "learned_penalty.parquet").write_bytes(b"kept")
    with caplog.at_level(logging.INFO):
        train(tmp_path, LearnedPenalty(), solver="kernel", ridge=0.1)
    (line,) = lines(caplog)
    assert "of an earlier start" in line
    assert (tmp_path / "learned_penalty.parquet").read_bytes() == b"kept"


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start"])
def test_a_run_that_fails_in_training_keeps_its_penalty(hook, tmp_path, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="on purpose"):
        train(tmp_path, Fails(hook), Settles(), LearnedPenalty(), solver="kernel", ridge=0.1)
    assert len(pd.read_parquet(tmp_path / "learned_penalty.parquet")) == 3
    assert (tmp_path / "pictures" / "learned_penalty.png").exists()
    assert not lines(caplog)


def test_a_run_that_fails_before_there_is_a_penalty_fails_for_its_own_reason(tmp_path):
    with pytest.raises(RuntimeError, match="on purpose"):
        train(tmp_path, Fails("on_fit_start"), Settles(), LearnedPenalty(), solver="kernel", ridge=0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_the_table_and_the_figures_of_the_first_start(tmp_path, folder_of_shapes, caplog):
    options = ["method=lqf", "method.solver=cg", "callbacks=[learned_penalty]", "test=false"]
    first = run_tiny(tmp_path, folder_of_shapes, *options, "trainer.max_epochs=1")
    table = pd.read_parquet(tmp_path / "learned_penalty.parquet")
    assert table["group"].iloc[[0, -1]].tolist() == ["stem", "head"]
    assert table["share_after"].sum() == pytest.approx(1)
    np.testing.assert_allclose(table["scale"] * table["ridge_factor"], 1)
    np.testing.assert_allclose(
        (table["scale"] * table["share_before"]).sum(), 1, rtol=1e-6
    )  # how scales are normalized
    assert {"train/loo_acc", "train/loo_loss", "train/probe_loo_acc"} <= first.keys()
    with caplog.at_level(logging.INFO):
        second = run_tiny(tmp_path, folder_of_shapes, *options, "trainer.max_epochs=2")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "learned_penalty.parquet"), table)
    assert second["train/loo_acc"] == first["train/loo_acc"]
    (line,) = lines(caplog)
    assert "of an earlier start" in line


def test_two_ranks_write_once_and_report_the_same(tmp_path):
    run_on_ranks(2, _write_on_ranks, str(tmp_path))
    written = pd.read_parquet(tmp_path / "0" / "learned_penalty.parquet")
    pd.testing.assert_frame_equal(written, tabulate_penalty(synthetic(), GROUPS, SIZES))
    assert not (tmp_path / "1").exists()


def _write_on_ranks(folder):
    rank, reported = torch.distributed.get_rank(), {}
    trainer = SimpleNamespace(is_global_zero=rank == 0, default_root_dir=f"{folder}/{rank}", loggers=[])
    module = settled()
    module.linearized = SimpleNamespace(deltas={name: torch.zeros(size) for name, size in SIZES.items()})
    module.log = lambda name, value, **_: reported.update({name: value})
    callback = LearnedPenalty()
    callback.on_train_start(trainer, module)
    callback.on_train_epoch_end(trainer, module)
    assert callback.written
    assert reported == {"train/loo_acc": 0.75, "train/loo_loss": 1.0, "train/probe_loo_acc": 0.375}


def test_the_table_and_the_picture_go_to_the_tracker(tmp_path, monkeypatch):
    logged = {}
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, key, dataframe: logged.update({key: dataframe}))
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images: logged.update({key: images}))
    trainer = SimpleNamespace(
        is_global_zero=True, default_root_dir=tmp_path, loggers=[WandbLogger.__new__(WandbLogger), object()]
    )
    module = settled("trace")
    module.linearized = SimpleNamespace(deltas={})
    LearnedPenalty().on_train_start(trainer, module)
    assert logged["pictures/learned_penalty"] == [str(tmp_path / "pictures" / "learned_penalty.png")]
    assert logged["train/learned_penalty"]["group"].tolist() == ["stem", "stage1", "head"]
    assert not math.isnan(logged["train/learned_penalty"]["share_before"].sum())
