import pytest
import torch
from torch.nn.functional import one_hot

from linear.problems import SCALES, make_toy, near
from lqf_lightning.congruence import tradeoff
from lqf_lightning.congruence.matching_problem import MatchingProblem
from lqf_lightning.congruence.tradeoff import HeldOutSamples, strengths, tradeoff_curve

SAMPLES, OTHERS = 12, 40
GRID = strengths([0.0, 0.5, 3.0], [0.0, 1.0, 8.0])


def setting(*, form="full", intercept=True, unknown=False, ridge=3.0):
    """A toy, its matching problem and held-out samples; the reference knows not all classes if `unknown`."""
    toy = make_toy(form=form, intercept=intercept, ridge=ridge, samples=SAMPLES, others=OTHERS)
    draw = torch.Generator().manual_seed(4)
    label = torch.arange(SAMPLES) % 3
    labels = toy.problem.with_(target=6 * one_hot(label, 3).double())
    reference = labels.target + 3 * torch.randn(SAMPLES, 3, generator=draw, dtype=torch.float64)
    position = torch.where(label == 1, -1, label) if unknown else label
    right = (reference.argmax(1) == label) & (position >= 0)
    assert 0 < right.sum() < (position >= 0).sum()
    other_label = torch.randint(3, (OTHERS,), generator=draw)
    known = (other_label != 1) if unknown else torch.ones(OTHERS, dtype=torch.bool)
    old_right = (torch.rand(OTHERS, generator=draw) < 0.6) & known
    held_out = HeldOutSamples(toy.initial_other, other_label, old_right, known)
    return toy, MatchingProblem(labels, reference, right, position), held_out


def brute_force(toy, problem, alpha, beta):
    """Outputs on the held-out samples, and the objective: labels and matching minimized as they stand."""
    focus = (problem.old_position >= 0) * (alpha + beta * problem.old_right.double())
    outputs, objective = toy.initial_other.clone(), 0.0
    replicas = 3 // toy.features.shape[2]
    blocks = [(b % toy.features.shape[0], columns) for b, columns in enumerate(torch.arange(3).view(replicas, -1))]
    for block, columns in blocks:
        rows = toy.features[block]
        size, ones = rows.shape[2], torch.eye(len(columns), dtype=torch.float64)
        if problem.labels.intercept:
            rows = torch.cat([rows, ones.expand(SAMPLES, -1, -1)], 2)
        penalty = problem.labels.ridge * torch.diag((torch.arange(rows.shape[2]) < size).double())
        target, reference = problem.labels.target[:, columns], problem.reference[:, columns]
        initial = problem.labels.initial[:, columns]
        hessian = torch.einsum("icp,icq->pq", rows, rows) + torch.einsum("i,icp,icq->pq", focus, rows, rows) + penalty
        pull = (target - initial) + focus[:, None] * (reference - initial)
        dw = torch.linalg.solve(hessian, torch.einsum("icp,ic->p", rows, pull))
        fitted = initial + rows @ dw
        objective += 0.5 * float((fitted - target).square().sum() + dw @ penalty @ dw)
        objective += 0.5 * float((focus * (fitted - reference).square().sum(1)).sum())
        other = toy.features_other[block]
        if problem.labels.intercept:
            other = torch.cat([other, ones.expand(OTHERS, -1, -1)], 2)
        outputs[:, columns] += other @ dw
    return outputs, objective


@pytest.mark.parametrize("worth", [1, 1000], ids=["spectrum", "cholesky"])
@pytest.mark.parametrize(
    "options", [{}, {"intercept": False}, {"unknown": True}, {"form": "trace"}, {"form": "diagonal"}]
)
def test_every_point_is_that_of_the_dense_problem(options, worth, monkeypatch):
    toy, problem, held_out = setting(**options)
    predicted = []
    predict = tradeoff.DualSystem.predict

    def note(self, *arguments):
        predicted.append(predict(self, *arguments))
        return predicted[-1]

    monkeypatch.setattr(tradeoff.DualSystem, "predict", note)
    curve = tradeoff_curve(problem, toy.kernel, toy.cross, held_out, GRID, scales=SCALES, worth=worth)
    for number, point in enumerate(GRID):
        expected, objective = brute_force(toy, problem, *point)
        assert near(predicted[number], expected, 1e-9)
        assert float(curve.objective[number]) == pytest.approx(objective, rel=1e-9)
        right = (expected.argmax(1) == held_out.label)[held_out.known]
        assert torch.equal(curve.new_right[number], right)
    assert curve.relative_gradient.max() < 1e-10
    assert len(curve.new_right.unique(dim=0)) > 2  # strengths matter


def test_points_of_a_spectrum_equal_those_of_factorizations():
    toy, problem, held_out = setting()
    points = strengths([0.0, 0.5, 2.0, 50.0], [0.0])
    one, other = (
        tradeoff_curve(problem, toy.kernel, toy.cross, held_out, points, scales=SCALES, worth=worth)
        for worth in (1, 1000)
    )
    assert near(one.objective, other.objective, 1e-9)
    assert torch.equal(one.counts, other.counts)


class Counter:
    def __init__(self, original):
        self.original, self.calls = original, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.original(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "worth", "spectra", "factors"),
    [
        ({}, 3, 1, 6),  # all points of beta = 0 at once
        ({}, 4, 0, 9),  # too few of them
        ({"unknown": True}, 1, 1, 8),  # weights differ wherever something is matched
    ],
)
def test_uniform_weights_share_one_decomposition(options, worth, spectra, factors, monkeypatch):
    toy, problem, held_out = setting(**options)
    spectrum, factor = Counter(tradeoff.KernelSpectrum), Counter(tradeoff.DualFactor)
    monkeypatch.setattr(tradeoff, "KernelSpectrum", spectrum)
    monkeypatch.setattr(tradeoff, "DualFactor", factor)
    tradeoff_curve(problem, toy.kernel, toy.cross, held_out, GRID, scales=SCALES, worth=worth)
    assert (spectrum.calls, factor.calls) == (spectra, factors)


def test_a_reference_that_is_always_right_makes_all_weights_uniform(monkeypatch):
    toy, problem, held_out = setting()
    sure = MatchingProblem(
        problem.labels, problem.reference, torch.ones(SAMPLES, dtype=torch.bool), problem.old_position
    )
    factor = Counter(tradeoff.DualFactor)
    monkeypatch.setattr(tradeoff, "DualFactor", factor)
    curve = tradeoff_curve(sure, toy.kernel, toy.cross, held_out, GRID, scales=SCALES, worth=1)
    assert factor.calls == 0
    assert curve.objective[GRID.index((0.0, 8.0))] == pytest.approx(brute_force(toy, sure, 0.0, 8.0)[1], rel=1e-9)


def test_counts_are_those_of_known_classes():
    toy, problem, held_out = setting(unknown=True)
    curve = tradeoff_curve(problem, toy.kernel, toy.cross, held_out, GRID, scales=SCALES)
    assert curve.counts.sum((1, 2)).tolist() == 9 * [int(held_out.known.sum())] != 9 * [OTHERS]
    for number in range(9):
        new, old = curve.new_right[number], held_out.old_right[held_out.known]
        assert curve.counts[number, 1, 0] == (old & ~new).sum()
        assert curve.counts[number, 0, 1] == (~old & new).sum()
        assert curve.rates["nfr"][number] == (old & ~new).double().mean()
        assert curve.rates["error_new"][number] == (~new).double().mean()
    assert curve.reference_error == float((~old).double().mean())
    assert torch.allclose(curve.rates["error_old"], torch.tensor(curve.reference_error, dtype=torch.float64))


def test_progress_is_told_point_by_point():
    toy, problem, held_out = setting()
    seen = []

    def watch(points):
        for point in points:
            yield point
            seen.append(point)

    tradeoff_curve(problem, toy.kernel, toy.cross, held_out, GRID, scales=SCALES, watch=watch)
    assert seen == GRID


def test_strengths_are_all_pairs_once():
    assert strengths([1, 0, 1], (2,)) == [(0.0, 2.0), (1.0, 2.0)]


@pytest.mark.parametrize("points", [[], [(1.0, -1.0)]])
def test_points_without_meaning_are_refused(points):
    toy, problem, held_out = setting()
    with pytest.raises(ValueError, match=r"not negative, got .*Set method\.tradeoff="):
        tradeoff_curve(problem, toy.kernel, toy.cross, held_out, points, scales=SCALES)


@pytest.mark.parametrize("worth", [1, 1000], ids=["spectrum", "cholesky"])
def test_a_ridge_that_vanishes_beside_the_weights_is_refused(worth):
    toy, problem, held_out = setting(ridge=1e-7)
    with pytest.raises(ValueError, match=r"too small .* Set method\.ridge|set method\.ridge"):
        tradeoff_curve(problem, toy.kernel, toy.cross, held_out, [(0.0, 0.0), (1e6, 0.0)], scales=SCALES, worth=worth)


def test_shapes_that_do_not_fit_are_told():
    toy, problem, held_out = setting()
    with pytest.raises(ValueError, match="reference"):
        MatchingProblem(problem.labels, problem.reference[:, :2], problem.old_right, problem.old_position)
    with pytest.raises(ValueError, match="two values per sample"):
        MatchingProblem(problem.labels, problem.reference, problem.old_right[:, None], problem.old_position)
    weighted = problem.labels.with_(weight=torch.ones(SAMPLES))
    with pytest.raises(ValueError, match="neither sample weights"):
        MatchingProblem(weighted, problem.reference, problem.old_right, problem.old_position)
    with pytest.raises(ValueError, match="three values per sample"):
        HeldOutSamples(held_out.initial, held_out.label[:, None], held_out.old_right, held_out.known)
    with pytest.raises(ValueError, match=r"class of no validation sample.*Set method\.tradeoff=null"):
        HeldOutSamples(held_out.initial, held_out.label, held_out.old_right, torch.zeros(OTHERS, dtype=torch.bool))
    assert toy.kernel.outputs == 3
