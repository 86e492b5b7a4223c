import math

import pandas as pd
import pytest
import torch
from lightning import Callback
from lqf_lightning.callbacks import LearningCurves, learning_curves
from lqf_lightning.callbacks.learning_curves import draw_confusion, draw_learning_curves

from lqf_lightning.methods import Finetune
from lqf_lightning.train import build_method
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from tiny import compose, run_tiny, tiny_overrides

CURVES = ["train/loss", "train/acc", "val/loss", "val/acc"]


def train(folder, *callbacks, epochs=2, trainer_options=None, **options):
    trainer = build_trainer(
        epochs, *callbacks, default_root_dir=folder, **{"limit_val_batches": 1.0, **(trainer_options or {})}
    )
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    method.model.drop.p = 0.0
    fit_on(trainer, method, TensorData(*draw(12), batch_size=5), **options)
    return trainer


def lines(figure):
    """Points of every curve by panel and label."""
    return {
        (axes.get_title(), line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for axes in figure.axes
        for line in axes.get_lines()
    }


def written_counts(monkeypatch, path):
    """Also write down the counts that are drawn; forked ranks inherit this."""

    def note(counts, classes):
        torch.save(counts, path)
        return draw_confusion(counts, classes)

    monkeypatch.setattr(learning_curves, "draw_confusion", note)


class Note(Callback):
    """The metrics of each epoch as Lightning logs them."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, pl_module):
        self.val = {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("val/")}

    def on_train_epoch_end(self, trainer, pl_module):
        self.rows.append({n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("train/")})
        self.rows[-1] |= self.__dict__.pop("val", {})


def test_the_history_holds_what_was_logged(tmp_path, folder_of_shapes):
    run_tiny(tmp_path, folder_of_shapes, "callbacks=[learning_curves,linear_probe]", "logger=csv")
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["LearningCurves"]
    logged = pd.read_csv(tmp_path / "csv" / "metrics.csv").groupby("epoch").first()
    assert [row["epoch"] for row in state["history"]] == [0, 1]
    for row in state["history"]:
        for name in [*CURVES, "val/linear_probe_acc"]:
            assert row[name] == pytest.approx(logged.loc[row["epoch"], name], rel=1e-6)


def test_epochs_without_validation_repeat_no_old_values(tmp_path):
    curves, note = LearningCurves(), Note()
    train(tmp_path, curves, note, epochs=5, trainer_options={"check_val_every_n_epoch": 2})
    assert [row["epoch"] for row in curves.history] == list(range(5))
    assert ["val/loss" in row for row in curves.history] == [False, True, False, True, False]
    for row, logged in zip(curves.history, note.rows, strict=True):
        names = [name for name in CURVES if name in logged]
        assert {name: row[name] for name in names} == pytest.approx({name: logged[name] for name in names})
        assert set(row) == {"epoch", *names}


def test_the_curves_go_on_after_resuming(tmp_path):
    whole, first, second = LearningCurves(), LearningCurves(), LearningCurves()
    train(tmp_path / "whole", whole, epochs=4)
    train(tmp_path / "parts", first, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    train(tmp_path / "parts", second, epochs=4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert len(second.history) == 4
    for got, want in zip(second.history, whole.history, strict=True):
        assert got == pytest.approx(want)


def test_curves_are_drawn_at_the_ends_of_epochs():
    history = [
        {"epoch": 0, "train/loss": 3.0, "train/acc": 0.25},
        {"epoch": 1, "train/loss": 2.0, "train/acc": 0.5, "val/loss": 2.5, "val/acc": 0.4, "val/linear_probe_acc": 0.7},
        {"epoch": 2, "train/loss": math.nan, "train/acc": 0.75},
    ]
    drawn = lines(draw_learning_curves(history))
    assert drawn["loss", "train"][:2] == [(1, 3.0), (2, 2.0)]
    assert drawn["accuracy", "train"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert drawn["loss", "val"] == [(2, 2.5)]
    assert drawn["accuracy", "val"] == [(2, 0.4)]
    assert {height for _, height in drawn["accuracy", "val, linear probe"]} == {0.7}
    assert len(drawn) == 5


def test_an_averaged_teacher_has_curves_of_its_own():
    history = [{"epoch": 0, "val/loss": 2.5, "val/acc": 0.4, "val/teacher_loss": 2.0, "val/teacher_acc": 0.6}]
    drawn = lines(draw_learning_curves(history))
    assert drawn["loss", "val, averaged teacher"] == [(1, 2.0)]
    assert drawn["accuracy", "val, averaged teacher"] == [(1, 0.6)]
    assert drawn["accuracy", "val"] == [(1, 0.4)]


def test_a_run_without_validation_has_training_curves(tmp_path):
    curves = LearningCurves()
    train(tmp_path, curves, trainer_options={"limit_val_batches": 0})
    assert [set(row) for row in curves.history] == [{"epoch", "train/loss", "train/acc"}] * 2
    assert (tmp_path / "pictures" / "learning_curves.png").stat().st_size > 1000


@pytest.mark.parametrize("options", [{"max_steps": 4}, {"epochs": 2}])
def test_the_last_picture_is_uploaded_once_whatever_ends_the_run(options, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(
        learning_curves, "save_picture", lambda *_, upload=True: uploads.append(len(curves.history)) if upload else None
    )
    curves = LearningCurves()
    train(
        tmp_path, curves, epochs=options.get("epochs", 9), trainer_options={"max_steps": options.get("max_steps", -1)}
    )
    assert uploads == [len(curves.history)]
    assert len(curves.history) in (1, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_confusion_matrix_counts_every_test_sample_once(world_size, tmp_path, folder_of_shapes, monkeypatch):
    written_counts(monkeypatch, tmp_path / "counts.pt")
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world_size}", "trainer.strategy=ddp_fork"]
    options = ["method=finetune", "callbacks=learning_curves", "method.optimizer.lr=0.05"]
    run_tiny(tmp_path / "run", folder_of_shapes, *options, *ranks, "trainer.max_epochs=1")

    data, method = build_method(compose(*tiny_overrides(folder_of_shapes), *options, "paths.output_dir=unused"))
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    method.load_state_dict(checkpoint["state_dict"])
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for batch in data.test_dataloader():
        for true, logits in zip(batch.target, method.eval()(batch.input), strict=True):
            expected[true, logits.argmax()] += 1
    assert torch.equal(torch.load(tmp_path / "counts.pt"), expected)
    assert expected.sum(1).tolist() == [5, 4, 4]


def test_counting_starts_over_at_every_test(tmp_path, monkeypatch):
    written_counts(monkeypatch, tmp_path / "counts.pt")
    trainer = train(tmp_path, LearningCurves(), epochs=1)
    for _ in range(2):
        trainer.test(trainer.lightning_module, datamodule=TensorData(*draw(12), batch_size=5), verbose=False)
        assert torch.load(tmp_path / "counts.pt").sum() == 12


def test_the_confusion_matrix_shows_shares_and_counts():
    counts = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 6]])
    axes = draw_confusion(counts, ["ant", "bee", "cat"]).axes[0]
    shares = [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [0.25, 0.0, 0.75]]
    assert axes.get_images()[0].get_array().tolist() == shares
    assert axes.get_title() == "accuracy 0.7500"
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert texts == {(0, 0): "3", (0, 1): "1", (2, 0): "2", (2, 2): "6"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee", "cat"]


def test_class_names_are_shown_as_they_are(tmp_path):
    names = ["$1", "$\\frac{$", "a_b^c"]
    figure = draw_confusion(torch.eye(3, dtype=torch.int64), names)
    figure.savefig(tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_many_classes_stay_readable():
    few, many = (draw_confusion(torch.eye(n, dtype=torch.int64), list(map(str, range(n)))) for n in (20, 200))
    assert (len(few.axes[0].texts), len(many.axes[0].texts)) == (20, 0)
    assert many.get_size_inches().max() <= 16
