import pytest
import torch

from lqf_lightning.linear.learned_penalty import LearnedPenalty
from lqf_lightning.methods.solvers import settle_penalty
from lqf_lightning.methods.solvers.narrow_tensors import set_narrow_apart, with_narrow
from methods.dense_lqf import build
from methods.solvers.runs import solve

LEARNED = {"ridge": "auto", "metric": "learned"}


@pytest.mark.parametrize(
    ("rows", "narrow"),
    [
        (2, []),
        (3, ["bn1.weight", "bn1.bias"]),
        (54, ["bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"]),
        (55, ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"]),
    ],
)
def test_tensors_with_fewer_entries_than_rows_are_set_apart_but_never_the_head(rows, narrow):
    method = build(solver="cg", **LEARNED)
    before = {name for names in method.penalty_groups.values() for name in names}
    set_narrow_apart(method, rows)
    assert list(method.penalty_groups.get("narrow", ())) == narrow
    assert {name for names in method.penalty_groups.values() for name in names} == before
    assert all(method.penalty_groups.values())
    assert method.penalty_groups["head"] == ("fc.weight", "fc.bias")


def test_they_come_back_frozen():
    one = torch.ones(1, dtype=torch.float64)
    found = LearnedPenalty({"stem": 2.0, "head": 0.5}, 3.0, 0.1, 1.0, one, one, {"stem": 0.75, "head": 0.25}, 0)
    whole = with_narrow(found)
    assert whole.scales == {"stem": 2.0, "head": 0.5, "narrow": 1e-9}
    assert whole.share["narrow"] == 0.0


def test_they_do_not_move_and_a_checkpoint_knows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(settle_penalty, "LEARNED_ROWS", 0)
    method = build(solver="cg", tolerance=1e-8, **LEARNED)
    trainer = solve(method, samples=24)  # 72 rows: everything below the head is narrow
    deltas = method.linearized.deltas
    still = torch.stack([delta.norm() for name, delta in deltas.items() if not name.startswith("fc")])
    assert still.max() < 1e-5 * deltas["fc.weight"].norm()
    assert method.learned_penalty.share == {"head": 1.0, "narrow": 0.0}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = build(solver="cg", tolerance=1e-8, **LEARNED)
    again.on_load_checkpoint(torch.load(tmp_path / "run.ckpt", weights_only=True))
    assert again.penalty_weights() == method.penalty_weights()
    assert again.penalty_groups == method.penalty_groups


def test_an_exact_kernel_has_no_use_for_it():
    method = build(solver="kernel", **LEARNED)
    solve(method, samples=24)
    assert "narrow" not in method.penalty_groups
