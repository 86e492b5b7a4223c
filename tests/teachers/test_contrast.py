import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lqf_lightning.teachers.contrast import info_nce, supervised_info_nce

T = 0.2


def vectors(number: int, seed: int, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(number, width, generator=generator, dtype=torch.float64), dim=1)


QUERY, KEY, QUEUE = vectors(4, 1), vectors(4, 2), vectors(9, 3)
LABEL = torch.tensor([0, 1, -1, 2])
QUEUE_LABEL = torch.tensor([1, 0, 0, -1, 3, 1, -1, 0, 3])  # two, three and none of classes 1, 0 and 2


def brute_force(same_class: str | None) -> float:
    """Sample by sample, from the definition."""
    losses = []
    for query, key, label in zip(QUERY, KEY, LABEL.tolist(), strict=True):
        own = math.exp(float(query @ key) / T)
        others = [math.exp(float(query @ other) / T) for other in QUEUE]
        same = [label >= 0 and label == other and same_class is not None for other in QUEUE_LABEL.tolist()]
        positives = [own] + [value for value, equal in zip(others, same, strict=True) if equal]
        if same_class == "ignored":
            others = [value for value, equal in zip(others, same, strict=True) if not equal]
            positives = [own]
        whole = own + sum(others)
        losses.append(sum(-math.log(value / whole) for value in positives) / len(positives))
    return sum(losses) / len(losses)


def test_it_is_the_cross_entropy_of_the_own_key() -> None:
    assert info_nce(QUERY, KEY, QUEUE, T).item() == pytest.approx(brute_force(None), rel=1e-12)


@pytest.mark.parametrize("same_class", ["positive", "ignored"])
def test_labels_count_as_defined(same_class) -> None:
    got = supervised_info_nce(QUERY, KEY, LABEL, QUEUE, QUEUE_LABEL, T, same_class)
    assert got.item() == pytest.approx(brute_force(same_class), rel=1e-12)
    assert abs(brute_force(same_class) - brute_force(None)) > 0.01


def test_a_queue_of_zeros_has_a_closed_form() -> None:
    s = (QUERY * KEY).sum(1) / T
    expected = ((s.exp() + 9).log() - s).mean()
    assert info_nce(QUERY, KEY, torch.zeros_like(QUEUE), T).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_order_of_the_queue_does_not_matter() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(info_nce(QUERY, KEY, QUEUE[order], T), info_nce(QUERY, KEY, QUEUE, T))
    both = [
        supervised_info_nce(QUERY, KEY, LABEL, QUEUE[rows], QUEUE_LABEL[rows], T) for rows in (order, torch.arange(9))
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("same_class", ["positive", "ignored"])
@pytest.mark.parametrize(
    ("label", "queue_label"),
    [(torch.arange(4), torch.arange(9) + 4), (torch.full((4,), -1), torch.full((9,), -1))],
    ids=["all classes distinct", "all classes unknown"],
)
def test_without_equal_classes_labels_change_nothing(same_class, label: Tensor, queue_label: Tensor) -> None:
    queries = [QUERY.clone().requires_grad_() for _ in range(2)]
    plain = info_nce(queries[0], KEY, QUEUE, T)
    labeled = supervised_info_nce(queries[1], KEY, label, QUEUE, queue_label, T, same_class)
    assert labeled.item() == plain.item()
    (one,), (other,) = torch.autograd.grad(plain, queries[0]), torch.autograd.grad(labeled, queries[1])
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_single_class_leaves_nothing_to_tell_apart() -> None:
    label, queue_label = torch.zeros(4, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    query = QUERY.clone().requires_grad_()
    ignored = supervised_info_nce(query, KEY, label, QUEUE, queue_label, T, "ignored")
    ignored.backward()
    assert ignored.item() == 0
    assert query.grad is not None
    assert query.grad.abs().max() == 0

    s = torch.cat([(QUERY * KEY).sum(1, keepdim=True), QUERY @ QUEUE.T], 1) / T
    every = -(s - s.logsumexp(1, keepdim=True)).mean()
    got = supervised_info_nce(QUERY, KEY, label, QUEUE, queue_label, T, "positive")
    torch.testing.assert_close(got, every)


def test_the_batch_as_its_own_queue_is_supervised_contrast() -> None:
    """Khosla et al., eq. 2: two views of four images, of which two are of one class."""
    views, label = torch.cat([QUERY, KEY]), torch.tensor([0, 1, 0, 2]).repeat(2)
    expected, got = [], []
    for anchor in range(8):
        others = [row for row in range(8) if row != anchor]
        scores = {row: math.exp(float(views[anchor] @ views[row]) / T) for row in others}
        positives = [row for row in others if label[row] == label[anchor]]
        expected.append(-sum(math.log(scores[row] / sum(scores.values())) for row in positives) / len(positives))
        partner = (anchor + 4) % 8
        rest = torch.tensor([row for row in others if row != partner])
        one = slice(anchor, anchor + 1)
        got.append(supervised_info_nce(views[one], views[[partner]], label[one], views[rest], label[rest], T).item())
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("same_class", [None, "positive", "ignored"])
def test_gradients_are_those_of_finite_differences(same_class) -> None:
    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        if same_class is None:
            return info_nce(query, key, queue, T)
        return supervised_info_nce(query, key, LABEL, queue, QUEUE_LABEL, T, same_class)

    assert torch.autograd.gradcheck(loss, [v.clone().requires_grad_() for v in (QUERY, KEY, QUEUE)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("same_class", ["positive", "ignored"])
def test_half_precision_is_computed_in_single(dtype: torch.dtype, same_class) -> None:
    """Exponents of 1 / 0.001 overflow half precision, and their differences vanish in it."""
    query, key, queue = (v.to(dtype).requires_grad_() for v in (QUERY, KEY, QUEUE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = supervised_info_nce(query, key, LABEL, queue, QUEUE_LABEL, 1e-3, same_class)
        plain = info_nce(query, key, queue, 1e-3)
    (got + plain).backward()
    exact = [v.detach().double() for v in (query, key, queue)]
    wanted = supervised_info_nce(exact[0], exact[1], LABEL, exact[2], QUEUE_LABEL, 1e-3, same_class)
    assert got.dtype == plain.dtype == torch.float32
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert plain.item() == pytest.approx(info_nce(*exact, 1e-3).item(), rel=1e-5)
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_nothing_to_tell_from_and_nothing_to_tell_cost_nothing() -> None:
    label, none = LABEL[:0], torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    assert info_nce(QUERY, KEY, none, T).item() == 0
    empty = info_nce(none, KEY[:0], QUEUE, T) + supervised_info_nce(none, KEY[:0], label, QUEUE, QUEUE_LABEL, T)
    empty.backward()
    assert empty.item() == 0


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 5\), \(3, 5\) and \(9, 5\)"):
        info_nce(QUERY, KEY[:3], QUEUE, T)
    with pytest.raises(ValueError, match=r"and \(9, 4\)"):
        info_nce(QUERY, KEY, QUEUE[:, :4], T)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"Set method.temperature=0.2"):
            info_nce(QUERY, KEY, QUEUE, temperature)
    with pytest.raises(ValueError, match=r"got \(4,\) and \(8,\)"):
        supervised_info_nce(QUERY, KEY, LABEL, QUEUE, QUEUE_LABEL[:8], T)
    with pytest.raises(ValueError, match=r"positive, ignored, got 'negative'. Set method.same_class=positive"):
        supervised_info_nce(QUERY, KEY, LABEL, QUEUE, QUEUE_LABEL, T, "negative")  # type: ignore[arg-type]  # on purpose
