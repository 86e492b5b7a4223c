import pytest
import torch

from linear.problems import SCALES, make_toy, near, refit
from lqf_lightning.information.reweight import detrimental, extend, held_out_derivative, reweight
from lqf_lightning.information.summarize import Judged
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.weighting import WeightDerivative


def noisy(wrong=(0, 5, 9), samples=24, others=60, spread=0.3, seed=0):
    """Two classes that lie apart, some of whose labels are swapped."""
    draw = torch.Generator().manual_seed(seed)
    rows = spread * torch.randn(samples + others, 5, generator=draw, dtype=torch.float64)
    label = torch.arange(samples + others) % 2
    rows[:, 0] += 4.0 * label - 2.0
    given = label.clone()
    given[list(wrong)] = 1 - given[list(wrong)]
    target = torch.nn.functional.one_hot(given, 2).double()
    inner = rows @ rows[:samples].T
    problem = QuadraticProblem(torch.zeros(samples, 2), target[:samples], ridge=1.0, intercept=True)
    kernel = Kernel({"all": inner[None, :samples]}, 2, "last_layer")
    return problem, kernel, Judged(
        Kernel({"all": inner[None, samples:]}, 2, "last_layer"), torch.zeros(others, 2), target[samples:]
    )  # fmt: skip


def test_swapped_labels_are_the_most_detrimental():
    problem, kernel, judged = noisy()
    for derivative in (held_out_derivative("validation", judged=judged), held_out_derivative("leave_one_out")):
        gradient = derivative(DualFactor(problem, kernel)).gradient
        assert set(detrimental(gradient, share=3 / 24).tolist()) == {0, 5, 9}


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_reweighting_lowers_the_held_out_loss_of_refits(loss):
    problem, kernel, judged = noisy(spread={"squared": 0.3, "cross_entropy": 2.0}[loss])
    derivative = held_out_derivative("validation", loss, judged=judged)
    result = reweight(problem, kernel, derivative, steps=3, length=0.3)
    assert all(later < earlier for earlier, later in zip(result.losses, result.losses[1:], strict=False))
    assert len(result.losses) > 1
    assert bool((result.weight >= 0).all())
    assert loss == "cross_entropy" or float(result.weight[[0, 5, 9]].max()) < float(result.weight.median())
    after = derivative(DualFactor(problem.with_(weight=result.weight), kernel)).loss
    assert after == pytest.approx(result.losses[-1], rel=1e-12)


def test_the_first_step_has_the_length_that_was_asked_for():
    problem, kernel, judged = noisy()
    result = reweight(problem, kernel, held_out_derivative("validation", judged=judged), steps=1, length=1e-3)
    change = result.weight - 1
    assert float(change.square().mean().sqrt()) == pytest.approx(1e-3, rel=1e-9)
    slope = result.derivative
    assert near(change / change.norm(), -slope / slope.norm(), 1e-6)
    expected = result.losses[0] - 1e-3 * float(slope.square().sum()) / float(slope.square().mean().sqrt())
    assert result.losses[1] - result.losses[0] == pytest.approx(expected - result.losses[0], rel=0.02)


def test_a_step_too_long_is_not_taken():
    problem, kernel, judged = noisy(wrong=())
    result = reweight(problem, kernel, held_out_derivative("validation", judged=judged), steps=3, length=1e6)
    assert result.losses == result.losses[:1]
    assert torch.equal(result.weight, torch.ones(24, dtype=torch.float64))


def test_extending_takes_the_best_of_the_pool_until_none_helps():
    problem, kernel, judged = noisy(wrong=(15, 18, 21))
    pool = torch.arange(12, 24)
    result = extend(problem, kernel, held_out_derivative("validation", judged=judged), pool, count=3, batch=2)
    assert len(result.added) == len(set(result.added.tolist())) == 3
    assert set(result.added.tolist()) <= set(pool.tolist()) - {15, 18, 21}
    assert int(result.added[0]) == 12 + int(result.derivative[12:].argmin())
    assert result.losses[-1] < result.losses[0]
    more = extend(problem, kernel, held_out_derivative("validation", judged=judged), pool, count=99, batch=2)
    assert len(more.added) < len(pool)  # wrong labels stay outside
    assert not {15, 18, 21} & set(more.added.tolist())


def test_a_round_that_raises_the_loss_is_left_out():
    problem, kernel, _ = noisy()
    losses = iter([3.0, 2.0, 2.5])

    def derivative(factor):
        return WeightDerivative(next(losses), -torch.arange(1.0, 25.0, dtype=torch.float64), temperature=None)

    result = extend(problem, kernel, derivative, torch.arange(20, 24), count=4, batch=2)
    assert result.added.tolist() == [23, 22]  # the first round; the second was tried
    assert result.losses == [3.0, 2.0]


def test_the_pool_is_judged_by_the_core_alone_where_there_is_no_validation_set():
    toy = make_toy(form="full", samples=8)
    judge = torch.tensor([1.0] * 5 + [0.0] * 3, dtype=torch.float64)
    derivative = held_out_derivative("leave_one_out", judge=judge)
    result = extend(toy.problem, toy.kernel, derivative, torch.arange(5, 8), SCALES, count=1)
    losses = []
    for extra in ([], [5], [6], [7]):
        rows = []
        for sample in range(5):
            keep = [i for i in range(5) if i != sample] + extra
            rows.append(refit(toy, keep, torch.ones(8, dtype=torch.float64)).outputs[sample])
        losses.append(float(0.5 * (torch.stack(rows) - toy.problem.target[:5]).square().sum(1).mean()))
    assert result.losses[0] == pytest.approx(losses[0], rel=1e-9)
    if len(result.added):
        assert result.losses[1] == pytest.approx(losses[1 + int(result.added[0]) - 5], rel=1e-9)


def test_thresholds_and_shares():
    gradient = torch.tensor([0.0, -1.0, 3.0, 1.0, 2.0])
    assert detrimental(gradient).tolist() == [2, 4, 3]
    assert detrimental(gradient, threshold=2.0).tolist() == [2, 4]
    assert detrimental(gradient, share=0.4).tolist() == [2, 4]
    assert detrimental(gradient - 9, share=0.6).tolist() == [2, 4, 3]


def test_options_out_of_range_are_refused():
    problem, kernel, judged = noisy()
    by_validation = held_out_derivative("validation", judged=judged)
    with pytest.raises(ValueError, match="Set by=leave_one_out"):
        held_out_derivative("validation")
    with pytest.raises(ValueError, match="got 'both'"):
        held_out_derivative("both")
    for options in ({"steps": 0}, {"length": 0.0}):
        with pytest.raises(ValueError, match=r"Set steps=3 and length=0\.5"):
            reweight(problem, kernel, by_validation, **options)
    with pytest.raises(ValueError, match="the pool not empty"):
        extend(problem, kernel, by_validation, torch.zeros(0, dtype=torch.int64), count=1)
    with pytest.raises(ValueError, match="expected one of them"):
        detrimental(torch.zeros(2), threshold=0.0, share=0.1)
