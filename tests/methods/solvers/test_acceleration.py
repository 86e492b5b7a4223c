import logging
from functools import partial

import pytest

from lqf_lightning.linear import CoefficientDescent, fit_kfac
from lqf_lightning.methods.solvers import acceleration, conjugate_gradients
from lqf_lightning.methods.solvers.training_table import TrainingTable
from methods.dense_lqf import build
from methods.solvers.runs import solve

KFAC = partial(fit_kfac, cotangents="random")
OPTIONS = {"solver": "cg", "ridge": 0.02, "tolerance": 1e-12}
COPY = 4 * 33 * 33 / 2**30  # GiB of a sketch with one column per row


@pytest.mark.parametrize(
    ("rows", "memory_gib", "options", "chosen"),
    [
        (33, 24.0, {}, "a sketch"),
        (33, 24.0, {"preconditioner": KFAC}, "a sketch"),
        (32, 24.0, {}, "none"),
        (32, 24.0, {"preconditioner": KFAC}, "kfac"),
        (33, 5.9 * COPY, {}, "none"),  # three copies of two columns per row have no room
        (33, 6.1 * COPY, {}, "a sketch"),
    ],
)
def test_acceleration_is_chosen_by_size(rows, memory_gib, options, chosen, monkeypatch, caplog):
    monkeypatch.setattr(acceleration, "_AUTOMATIC", rows)
    caplog.set_level(logging.INFO, "lqf_lightning")
    method = build(**OPTIONS, **options, memory_gib=memory_gib)
    solve(method, epochs=1)
    (reason,) = (text for text in caplog.messages if "accelerated by" in text)
    assert f"accelerated by {chosen}: 11 samples x 3 classes = 33 rows" in reason
    assert (f"more than method.memory_gib={memory_gib}" in reason) == (memory_gib < 6 * COPY)
    assert isinstance(method.solver.descent, CoefficientDescent) == (chosen == "a sketch")


def test_a_sketch_of_too_many_rows_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(conjugate_gradients, "SKETCH_LIMIT", 32)
    monkeypatch.setattr(TrainingTable, "collect", lambda *_: pytest.fail("this should have been refused before"))
    with pytest.raises(
        ValueError, match=r"acceleration=sketch is for at most 32 .* got 11 x 3 = 33\. Set .*method\.acceleration=auto"
    ):
        solve(build(**OPTIONS, acceleration="sketch"))


def test_a_sketch_without_room_is_refused_with_memory_that_would_do():
    memory = 5.9 * COPY
    with pytest.raises(ValueError, match=rf"33 rows needs .* GiB, memory_gib={memory}\. Set") as caught:
        solve(build(**OPTIONS, acceleration="sketch", memory_gib=memory))
    message = str(caught.value)
    assert float(message.split("needs ")[1].split()[0]) == pytest.approx(6 * COPY, rel=0.05)
    enough = float(message.split("method.memory_gib=")[1].split(",")[0])
    method = build(**OPTIONS, acceleration="sketch", memory_gib=enough)
    solve(method, epochs=1)
    assert isinstance(method.solver.descent, CoefficientDescent)
