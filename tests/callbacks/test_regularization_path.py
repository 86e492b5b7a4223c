import logging
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Callback
from lqf_lightning.callbacks import RegularizationPath
from lqf_lightning.callbacks.regularization_path import draw_path, tabulate_path

from lqf_lightning import linear
from lqf_lightning.methods import LQF, Finetune
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from ranks import run_on_ranks
from tiny import run_tiny

SAMPLES = 7
COLUMNS = (
    "ridge", "mu", "chosen", "accuracy", "press", "cross_entropy", "gcv", "degrees_of_freedom", "weight_norm",
    "training_error",
)  # fmt: skip


class SweptData(TensorData):
    """Exact solvers ask for one sweep over the samples in order, which these are in anyway."""

    sweeps = 0


class Fails(Callback):
    """Ends the run before its first step."""

    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("on purpose")


def train(folder, *callbacks, method=LQF, **options):
    trainer = build_trainer(1, *callbacks, default_root_dir=folder)
    built = method(build_backbone(), CLASSES, optimizer=SGD, **options)
    fit_on(trainer, built, SweptData(*draw(SAMPLES)))
    return built


train_surrogate = partial(train, solver="sgd", ridge="auto", normalize_step=False)


def synthetic(accuracy=(0.5, 0.75, 0.25), press=(30.0, 20.0, 25.0)):
    """Two outputs, 4 samples, ridges 4, 8 and 40: means of 1, 2 and 10."""
    rows = torch.arange(1.0, 4.0, dtype=torch.float64)
    return linear.RegularizationPath(
        ridges=torch.tensor([4.0, 8.0, 40.0], dtype=torch.float64),
        residual=torch.zeros(3, 4, 2),
        press=torch.tensor(press),
        accuracy=None if accuracy is None else torch.tensor(accuracy),
        cross_entropy=None if accuracy is None else rows / 4,
        gcv=rows + 10,
        degrees_of_freedom=rows + 20,
        weight_norm=rows + 30,
        training_error=rows + 40,
    )


def test_an_exact_run_writes_what_plain_refits_without_each_sample_give(tmp_path):
    method = train(tmp_path, RegularizationPath(), solver="kernel", ridge="auto", group_ridge={"stem": 3.0})
    table = pd.read_parquet(tmp_path / "regularization_path.parquet")
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 16
    (chosen,) = table.index[table["chosen"]]
    assert table["mu"][chosen] == pytest.approx(method.ridge, rel=1e-12)
    np.testing.assert_allclose(table["mu"], table["ridge"] / SAMPLES, rtol=1e-12)
    errors, movement, right = refits(method, table["ridge"][chosen])
    assert table["press"][chosen] == pytest.approx(errors, rel=1e-6)
    assert table["accuracy"][chosen] == pytest.approx(right, abs=1e-12)
    assert table["weight_norm"][chosen] == pytest.approx(movement, rel=1e-6)


def refits(method, ridge):
    """Squared leave-one-out residuals, |dw| in the metric and leave-one-out accuracy, from normal equations."""
    images, label = draw(SAMPLES)
    target = method.target_scale * torch.nn.functional.one_hot(label, len(CLASSES)).double()
    weights = method.penalty_weights()
    rows = torch.func.jacrev(lambda deltas: torch.func.functional_call(method.backbone.model, deltas, images))({
        name: p.detach() for name, p in method.backbone.model.named_parameters()
    })
    scaled = torch.cat([rows[name].flatten(2) / weights[name] ** 0.5 for name in weights], 2)
    ones = torch.eye(len(CLASSES), dtype=torch.float64).expand(SAMPLES, -1, -1)
    design = torch.cat([scaled, ones], 2)
    initial = method.backbone.model(images).detach()
    penalty = torch.diag(torch.tensor([ridge] * scaled.shape[2] + [0.0] * len(CLASSES)).double())

    def solve(kept):
        part = design[kept].flatten(0, 1)
        return torch.linalg.solve(part.T @ part + penalty, part.T @ (target - initial)[kept].flatten())

    held = torch.stack([initial[i] + design[i] @ solve([j for j in range(SAMPLES) if j != i]) for i in range(SAMPLES)])
    movement = solve(list(range(SAMPLES)))[: scaled.shape[2]].norm()
    return (held - target).square().sum().item(), movement.item(), (held.argmax(1) == label).double().mean().item()


def test_the_title_says_what_the_path_is_of(tmp_path, monkeypatch):
    titles = []
    from lqf_lightning.callbacks import regularization_path

    def note(table, **options):
        figure = draw_path(table, **options)
        titles.append(figure.get_suptitle())
        return figure

    monkeypatch.setattr(regularization_path, "draw_path", note)
    train(tmp_path / "exact", RegularizationPath(), solver="kernel", ridge="auto")
    train_surrogate(tmp_path / "surrogate", RegularizationPath())
    assert "exact" in titles[0]
    assert "surrogate" not in titles[0]
    assert "surrogate" in titles[1]
    assert "exact" not in titles[1]
    for folder in ("exact", "surrogate"):
        assert (tmp_path / folder / "pictures" / "regularization_path.png").stat().st_size > 1000


@pytest.mark.parametrize("options", [{"solver": "kernel", "ridge": 0.1}, {"method": Finetune}])
def test_a_run_without_a_path_says_so_and_goes_on(options, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tmp_path, RegularizationPath(), **options)
    (line,) = [record.getMessage() for record in caplog.records if "no regularization path" in record.getMessage()]
    assert "method.ridge=auto" in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_before_its_first_step_keeps_its_path(tmp_path, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="on purpose"):
        train_surrogate(tmp_path, Fails(), RegularizationPath())
    assert len(pd.read_parquet(tmp_path / "regularization_path.parquet")) == 16
    assert (tmp_path / "pictures" / "regularization_path.png").exists()
    assert not [record for record in caplog.records if "no regularization path" in record.getMessage()]


def test_a_resumed_run_keeps_the_files_of_the_first_start(tmp_path, folder_of_shapes, caplog):
    options = ["method.solver=cg", "method.ridge=auto", "callbacks=regularization_path"]
    run_tiny(tmp_path, folder_of_shapes, *options, "trainer.max_epochs=1", "test=false")
    before = (tmp_path / "regularization_path.parquet").read_bytes()
    with caplog.at_level(logging.INFO):
        run_tiny(tmp_path, folder_of_shapes, *options, "trainer.max_epochs=2", "test=false")
    assert (tmp_path / "regularization_path.parquet").read_bytes() == before
    (line,) = [record.getMessage() for record in caplog.records if "no regularization path" in record.getMessage()]
    assert "of an earlier start" in line


def test_two_ranks_write_the_path_of_all_samples_once(tmp_path):
    run_on_ranks(2, _write_on_ranks, str(tmp_path))
    one = tabulate_path(synthetic(), mu=2.0)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "0" / "regularization_path.parquet"), one)
    assert not (tmp_path / "1").exists()


def _write_on_ranks(folder):
    from types import SimpleNamespace

    rank = torch.distributed.get_rank()
    trainer = SimpleNamespace(is_global_zero=rank == 0, default_root_dir=f"{folder}/{rank}", loggers=[])
    method = SimpleNamespace(path=synthetic(), path_form="full", ridge=2.0)
    RegularizationPath().on_train_start(trainer, method)


def test_the_table_holds_every_ridge_in_both_forms():
    table = tabulate_path(synthetic(), mu=2.0)
    assert table["ridge"].tolist() == [4.0, 8.0, 40.0]
    assert table["mu"].tolist() == [1.0, 2.0, 10.0]
    assert table["chosen"].tolist() == [False, True, False]
    assert table["accuracy"].tolist() == [0.5, 0.75, 0.25]
    assert table["press"].tolist() == [30.0, 20.0, 25.0]
    assert table["cross_entropy"].tolist() == [0.25, 0.5, 0.75]
    for start, name in enumerate(COLUMNS[6:], 1):
        assert table[name].tolist() == [10.0 * start + r for r in (1, 2, 3)]


def test_the_picture_shows_accuracy_and_press_and_marks_the_choice():
    figure = draw_path(tabulate_path(synthetic(), mu=2.0), exact=True)
    accuracy, press = figure.axes
    assert "accuracy" in accuracy.get_title()
    assert "PRESS" in press.get_title()
    for axes, values in ((accuracy, [0.5, 0.75, 0.25]), (press, [30.0, 20.0, 25.0])):
        curve, mark = axes.get_lines()
        assert axes.get_xscale() == "log"
        assert list(curve.get_xdata()) == [1.0, 2.0, 10.0]
        assert list(curve.get_ydata()) == values
        assert set(mark.get_xdata()) == {2.0}
        assert "2" in mark.get_label()
    assert press.get_yscale() == "linear"


def test_a_press_of_several_decades_takes_a_logarithmic_axis():
    table = tabulate_path(synthetic(press=(3000.0, 20.0, 25.0)), mu=2.0)
    assert draw_path(table, exact=True).axes[1].get_yscale() == "log"


def test_a_single_output_has_a_press_only():
    table = tabulate_path(synthetic(accuracy=None), mu=10.0)
    assert all(math.isnan(value) for name in ("accuracy", "cross_entropy") for value in table[name])
    (axes,) = draw_path(table, exact=False).axes
    assert "PRESS" in axes.get_title()
