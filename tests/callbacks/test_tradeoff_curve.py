import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Callback
from lqf_lightning.callbacks.tradeoff_curve import TradeoffCurve, draw_tradeoff, tabulate_tradeoff

from lqf_lightning.congruence.intervals import flip_intervals
from lqf_lightning.congruence.tradeoff import TradeoffCurve as Curve
from methods.dense_lqf import build
from methods.matched_lqf import SAMPLES, build_teacher
from methods.tensors import TensorData, build_trainer, draw, fit_on
from ranks import run_on_ranks
from tiny import run_tiny

GRID = {"alpha": [0.0, 2.0], "beta": [0.0, 5.0]}
COLUMNS = (
    "alpha", "beta", "chosen", "error", "nfr", "pfr", "relative_nfr", "error_low", "error_high", "nfr_low", "nfr_high",
    "both_wrong", "positive_flips", "negative_flips", "both_right", "objective", "relative_gradient", "reference_error",
)  # fmt: skip


def synthetic():
    """Four strengths, ten samples of which the reference gets six right."""
    old_right = torch.arange(10) < 6
    wrong = [[0, 1, 8], [1, 7, 8], [5, 9], [6, 7, 8, 9]]
    new_right = torch.ones(4, 10, dtype=torch.bool)
    for row, samples in zip(new_right, wrong, strict=True):
        row[samples] = False
    counts = [
        [[int((~old_right & ~row).sum()), int((~old_right & row).sum())],
         [int((old_right & ~row).sum()), int((old_right & row).sum())]] for row in new_right
    ]  # fmt: skip
    return Curve(
        alpha=torch.tensor([0.0, 0.0, 2.0, 2.0]),
        beta=torch.tensor([0.0, 5.0, 0.0, 5.0]),
        counts=torch.tensor(counts),
        new_right=new_right,
        old_right=old_right,
        objective=torch.arange(4.0),
        relative_gradient=torch.full((4,), 1e-12),
    )


class Fails(Callback):
    """Ends the run before its first step."""

    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("on purpose")


def train(folder, *callbacks, **options):
    trainer = build_trainer(1, *callbacks, default_root_dir=folder)
    method = build(solver="kernel", ridge=0.02, reference=build_teacher(), **options)
    fit_on(trainer, method, TensorData(*draw(SAMPLES), 4, val=draw(9, seed=7)))
    return method


def test_the_table_of_a_run_is_that_of_its_curve(tmp_path):
    method = train(tmp_path, TradeoffCurve(), tradeoff=GRID, alpha=2.0, beta=5.0)
    table, curve = pd.read_parquet(tmp_path / "tradeoff_curve.parquet"), method.tradeoff_curve
    assert tuple(table.columns) == COLUMNS
    pd.testing.assert_frame_equal(table, tabulate_tradeoff(curve, 2.0, 5.0))
    assert table["chosen"].tolist() == [False, False, False, True]
    np.testing.assert_allclose(table["nfr"] - table["pfr"], table["error"] - table["reference_error"], atol=1e-12)
    assert (tmp_path / "pictures" / "tradeoff_curve.png").stat().st_size > 1000


def test_rates_and_intervals_come_from_the_counts():
    curve = synthetic()
    table = tabulate_tradeoff(curve, 0.0, 5.0)
    assert table["negative_flips"].tolist() == [2, 1, 1, 0]
    assert table["positive_flips"].tolist() == [3, 2, 3, 0]
    assert table["both_wrong"].tolist() == [1, 2, 1, 4]
    assert table["both_right"].tolist() == [4, 5, 5, 6]
    assert table["error"].tolist() == pytest.approx([0.3, 0.3, 0.2, 0.4])
    assert table["nfr"].tolist() == pytest.approx([0.2, 0.1, 0.1, 0.0])
    assert table["relative_nfr"].tolist() == pytest.approx([0.2 / 0.18, 0.1 / 0.18, 0.1 / 0.12, 0.0])
    assert table["reference_error"].tolist() == pytest.approx(4 * [0.4])
    assert table["chosen"].tolist() == [False, True, False, False]
    intervals = flip_intervals(curve.counts)
    assert table["nfr_high"].tolist() == intervals["nfr"].high.tolist()
    assert table["error_low"].tolist() == intervals["error_new"].low.tolist()


def test_the_picture_has_a_line_per_alpha_and_marks_run_and_reference():
    (axes,) = draw_tradeoff(tabulate_tradeoff(synthetic(), 0.0, 5.0)).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"alpha = 0", "alpha = 2", "this run", "reference"}
    assert list(lines["alpha = 0"].get_xdata()) == pytest.approx([0.2, 0.1])
    assert list(lines["alpha = 0"].get_ydata()) == pytest.approx([0.3, 0.3])
    assert list(lines["alpha = 2"].get_xdata()) == pytest.approx([0.1, 0.0])
    assert list(lines["this run"].get_xdata()) == pytest.approx([0.1])
    assert set(lines["reference"].get_ydata()) == {0.4}
    assert sorted(text.get_text() for text in axes.texts) == ["0", "0", "5", "5"]
    assert "10 samples" in axes.figure.get_suptitle()


def test_a_run_whose_strength_is_not_compared_is_not_marked():
    (axes,) = draw_tradeoff(tabulate_tradeoff(synthetic(), 1.0, 5.0)).axes
    assert "this run" not in {line.get_label() for line in axes.get_lines()}


def test_a_run_without_a_curve_says_so_and_goes_on(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tmp_path, TradeoffCurve())
    (line,) = [text for text in caplog.messages if "no tradeoff curve" in text]
    assert "method.tradeoff=" in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_before_its_first_step_keeps_its_curve(tmp_path):
    with pytest.raises(RuntimeError, match="on purpose"):
        train(tmp_path, Fails(), TradeoffCurve(), tradeoff=GRID)
    assert len(pd.read_parquet(tmp_path / "tradeoff_curve.parquet")) == 4
    assert (tmp_path / "pictures" / "tradeoff_curve.png").exists()


def test_two_ranks_write_once(tmp_path):
    run_on_ranks(2, _write_on_ranks, str(tmp_path))
    assert len(pd.read_parquet(tmp_path / "0" / "tradeoff_curve.parquet")) == 4
    assert not (tmp_path / "1").exists()


def _write_on_ranks(folder):
    rank = torch.distributed.get_rank()
    trainer = SimpleNamespace(is_global_zero=rank == 0, default_root_dir=f"{folder}/{rank}", loggers=[])
    TradeoffCurve().on_train_start(
        trainer, SimpleNamespace(tradeoff_curve=synthetic(), hparams={"alpha": 0, "beta": 5})
    )


def test_a_resumed_run_keeps_the_files_of_the_first_start_and_wandb_has_the_picture(
    tmp_path, folder_of_shapes, wandb_runs, caplog
):
    import wandb

    run_tiny(tmp_path / "old", folder_of_shapes, "method=linear_probe", "callbacks=[]", "test=false", "seed=3")
    options = (
        "method.solver=kernel", "method.ridge=0.3", "method.reference_scale=1.0", "callbacks=tradeoff_curve",
        "test=false", "method.tradeoff={alpha: [0, 1], beta: [0, 5]}", "data.shots=4", "method.layers=[head]",
        f"reference={tmp_path}/old/checkpoints/last.ckpt",
    )  # fmt: skip
    run_tiny(tmp_path / "run", folder_of_shapes, *options, "logger=wandb")
    wandb.finish()
    (run,) = wandb_runs()
    assert run.picture("pictures/tradeoff_curve").stat().st_size > 1000
    before = (tmp_path / "run" / "tradeoff_curve.parquet").read_bytes()
    with caplog.at_level(logging.INFO):
        run_tiny(tmp_path / "run", folder_of_shapes, *options)
    assert (tmp_path / "run" / "tradeoff_curve.parquet").read_bytes() == before
