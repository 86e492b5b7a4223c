import torch

from lqf_lightning.methods.solvers.sweep import PullSweep, PushSweep
from methods.dense_lqf import build, flat, jacobian, split
from methods.tensors import draw


def test_a_push_is_the_product_with_the_dense_jacobian():
    method, (images, _) = build(), draw(7)
    rows = jacobian(images, list(method.linearized.deltas))
    vector = torch.randn(rows.shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sweep = PushSweep(method.linearized, split(vector, method))
    for batch in (images[:3], images[3:3], images[3:]):
        sweep.take(batch)
    assert torch.allclose(sweep.result(3), rows @ vector, rtol=1e-10, atol=1e-12)


def test_a_pull_is_the_product_with_its_transpose():
    method, (images, _) = build(), draw(7)
    rows = jacobian(images, list(method.linearized.deltas))
    sides = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sweep = PullSweep(method.linearized, sides)
    for batch in (images[:3], images[3:3], images[3:]):
        sweep.take(batch)
    assert torch.allclose(flat(sweep.result()[0]), torch.einsum("bcp,bc->p", rows, sides), rtol=1e-10, atol=1e-12)


def test_without_samples_there_are_no_rows_and_zero_sums():
    method, (images, _) = build(), draw(2)
    push, pull = PushSweep(method.linearized, {}), PullSweep(method.linearized, torch.zeros(0, 3))
    push.take(images[:0])
    pull.take(images[:0])
    assert push.result(3).shape == (0, 3)
    (pulled,) = pull.result()
    assert {n: g.shape for n, g in pulled.items()} == {n: d.shape for n, d in method.linearized.deltas.items()}
    assert not flat(pulled).any()
