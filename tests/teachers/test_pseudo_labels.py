import math

import pytest
import torch
from torch import Tensor

from lqf_lightning.teachers.pseudo_labels import pseudo_label_loss, pseudo_labels

LOGITS = 2 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def probabilities(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def cross_entropies(logits: Tensor, label: Tensor) -> list[float]:
    return [-math.log(probabilities(row)[c]) for row, c in zip(logits.tolist(), label.tolist(), strict=True)]


def test_sure_samples_get_their_most_probable_class() -> None:
    label, selected = pseudo_labels(LOGITS, 0.7)
    rows = [probabilities(row) for row in LOGITS.tolist()]
    assert label.tolist() == [row.index(max(row)) for row in rows]
    assert selected.tolist() == [max(row) >= 0.7 for row in rows]
    assert 0 < selected.sum() < 8
    assert not selected.requires_grad


def test_a_threshold_of_zero_selects_all() -> None:
    assert pseudo_labels(LOGITS, 0)[1].all()


def test_equality_counts_as_sure() -> None:
    """Four equal outputs have probability 1/4 without rounding."""
    even = torch.zeros(2, 4)
    assert pseudo_labels(even, 0.25)[1].all()
    assert not pseudo_labels(even, math.nextafter(0.25, 1) + 1e-7)[1].any()
    certain = torch.tensor([[0.0, 200.0]])
    assert pseudo_labels(certain, 1)[1].all()


def test_above_one_nothing_is_learnt() -> None:
    certain = torch.tensor([[0.0, 200.0], [200.0, 0.0]])
    label, selected = pseudo_labels(certain, 1.01)
    student = torch.tensor([[1.0, -2.0], [3.0, 0.5]], requires_grad=True)
    loss = pseudo_label_loss(student, label, selected)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.abs().max() == 0


def test_the_loss_is_divided_by_all_samples() -> None:
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    selected = torch.tensor([True, False] * 4)
    total = sum(value for value, chosen in zip(cross_entropies(LOGITS, label), selected, strict=True) if chosen)
    loss = pseudo_label_loss(LOGITS, label, selected).item()
    assert loss == pytest.approx(total / 8, rel=1e-12)
    assert loss != pytest.approx(total / int(selected.sum()), rel=0.1)


def test_samples_that_are_not_selected_get_no_gradient() -> None:
    label, selected = torch.zeros(8, dtype=torch.int64), torch.arange(8) % 3 == 0
    student = LOGITS.clone().requires_grad_()
    pseudo_label_loss(student, label, selected).backward()
    expected = (LOGITS.softmax(1) - torch.tensor([1.0, 0.0, 0.0])) / 8 * selected[:, None]
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected)
    assert (student.grad[~selected] == 0).all()


def test_gradients_are_those_of_finite_differences() -> None:
    label, selected = pseudo_labels(LOGITS.flip(0), 0.6)
    assert torch.autograd.gradcheck(lambda z: pseudo_label_loss(z, label, selected), LOGITS.clone().requires_grad_())


def test_the_teacher_gets_no_gradient() -> None:
    teacher, student = LOGITS.clone().requires_grad_(), LOGITS.flip(0).requires_grad_()
    pseudo_label_loss(student, *pseudo_labels(teacher, 0.1)).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """A probability of 0.7002 lies above 0.7, but is less than what bfloat16 tells from it."""
    gap = math.log(0.7002 / 0.2998)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pseudo_labels(torch.tensor([[gap, 0.0]]), 0.7)[1].item()
        student = (4 * LOGITS).to(dtype).requires_grad_()
        label, selected = torch.arange(8) % 3, torch.ones(8, dtype=torch.bool)
        loss = pseudo_label_loss(student, label, selected)
    loss.backward()
    expected = sum(cross_entropies(student.detach().double(), label)) / 8
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_an_empty_batch_costs_nothing() -> None:
    student = torch.zeros(0, 3, requires_grad=True)
    loss = pseudo_label_loss(student, *pseudo_labels(student, 0.5))
    loss.backward()
    assert loss.item() == 0


def test_wrong_input_is_refused() -> None:
    label, selected = pseudo_labels(LOGITS, 0.5)
    with pytest.raises(ValueError, match=r"got \(8, 3\), \(8, 1\) and \(8,\)"):
        pseudo_label_loss(LOGITS, label[:, None], selected)
    with pytest.raises(ValueError, match=r"bool, got torch\.float64"):
        pseudo_label_loss(LOGITS, label, selected.double())
    with pytest.raises(ValueError, match=r"got \(8, 0\)"):
        pseudo_labels(LOGITS[:, :0], 0.5)
    for threshold in (-0.1, math.nan):
        with pytest.raises(ValueError, match=r"Set method.threshold=0.7"):
            pseudo_labels(LOGITS, threshold)
