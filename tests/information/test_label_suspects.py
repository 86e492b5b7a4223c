import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lqf_lightning.information.label_suspects import LabelSuspects, label_suspects
from lqf_lightning.linear.features import Features
from lqf_lightning.linear.leave_one_out import LeaveOneOut
from lqf_lightning.linear.primal import leave_one_out_primal
from lqf_lightning.linear.problem import QuadraticProblem

ALPHA = 5.0


def clusters(samples: int = 90) -> tuple[Tensor, Tensor]:
    """Three separable clusters (n, 6), and their classes."""
    draw = torch.Generator().manual_seed(0)
    label = torch.arange(samples) % 3
    centers = 3 * torch.randn(3, 6, generator=draw, dtype=torch.float64)
    return centers[label] + 0.5 * torch.randn(samples, 6, generator=draw, dtype=torch.float64), label


def removed(rows: Tensor, label: Tensor) -> LeaveOneOut:
    target = ALPHA * one_hot(label, 3).double()
    problem = QuadraticProblem(torch.zeros_like(target), target, ridge=1.0, intercept=True)
    return leave_one_out_primal(problem, Features(rows.unsqueeze(1)))


def suspects(result: LeaveOneOut, label: Tensor) -> LabelSuspects:
    return label_suspects(result.prediction, label, result.residual)


def test_flipped_labels_of_separable_clusters_rank_first_and_get_their_classes_back():
    rows, label = clusters()
    flipped = torch.arange(0, 90, 10)
    noisy = label.clone()
    noisy[flipped] = (label[flipped] + 1) % 3
    found = suspects(removed(rows, noisy), noisy)
    assert set(found.suspicion.topk(9).indices.tolist()) == set(flipped.tolist())
    assert torch.equal(found.margin > 0, torch.isin(torch.arange(90), flipped))
    assert torch.equal(found.proposed, label)


def test_the_margin_is_what_the_best_other_label_takes_from_the_squared_residual():
    rows, label = clusters()
    rows = rows + 2 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).double()
    result = removed(rows, label)
    squares = torch.stack([(ALPHA * one_hot(torch.full_like(label, c), 3) - result.prediction) for c in range(3)], 1)
    squares = squares.square().sum(2)
    own = squares.gather(1, label[:, None])[:, 0]
    found = suspects(result, label)
    best_other = squares.scatter(1, label[:, None], torch.inf).amin(1)
    assert torch.allclose(2 * ALPHA * found.margin, own - best_other, rtol=0, atol=1e-11)
    assert torch.allclose(found.squared_residual, own, rtol=1e-12, atol=0)
    assert torch.equal(found.proposed, squares.argmin(1))


def test_a_sample_is_judged_by_the_others_whatever_its_own_label():
    rows, label = clusters()
    before = suspects(removed(rows, label), label)
    other = label.clone()
    other[7] = (label[7] + 1) % 3
    after = suspects(removed(rows, other), other)
    assert after.proposed[7] == before.proposed[7] == label[7]
    assert float(after.proposed_margin[7]) == pytest.approx(float(before.proposed_margin[7]), rel=1e-9)
    assert float(before.margin[7]) == pytest.approx(-float(before.proposed_margin[7]), rel=1e-9)
    assert float(after.margin[7]) >= float(after.proposed_margin[7])


def test_suspicion_is_the_cross_entropy_of_the_label_at_the_temperature_that_suits_all_labels():
    rows, label = clusters()
    rows = rows + 2 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).double()
    label[::7] = (label[::7] + 1) % 3  # wrong ones, so that no temperature is too low
    result = removed(rows, label)
    found = suspects(result, label)
    grid = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    losses = torch.stack([cross_entropy(result.prediction / t, label, reduction="none") for t in grid])
    best = losses.mean(1).argmin()
    assert 0 < best < len(grid) - 1
    assert torch.allclose(found.suspicion, losses[best], rtol=2e-3, atol=1e-4)  # the grid's distance from the optimum
    assert float(found.suspicion.mean()) <= float(losses[best].mean()) + 1e-12


def test_outputs_far_from_every_label_are_not_held_against_one():
    prediction = torch.tensor([[0.3, -4.0, -4.0], [0.4, 0.6, 0.0]])
    found = label_suspects(prediction, torch.tensor([0, 0]), torch.eye(3)[[0, 0]] - prediction)
    assert found.squared_residual[0] > found.squared_residual[1]
    assert found.margin.tolist() == pytest.approx([-4.3, 0.2], rel=1e-6)
    assert found.suspicion[0] < found.suspicion[1]
    assert found.proposed_margin.tolist() == pytest.approx([4.3, 0.2], rel=1e-6)


def test_what_cannot_be_judged_is_refused():
    outputs, label = torch.zeros(2, 3), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 2\) and \(2,\)"):
        label_suspects(outputs, label, outputs[:, :2])
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 3\) and \(1,\)"):
        label_suspects(outputs, label[:1], outputs)
    with pytest.raises(ValueError, match="single output"):
        label_suspects(outputs[:, :1], label, outputs[:, :1])
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="labels must be integers from 0 to 2"):
            label_suspects(outputs, wrong, outputs)
    with pytest.raises(ValueError, match="not finite"):
        label_suspects(torch.full((2, 3), torch.nan), label, outputs)
