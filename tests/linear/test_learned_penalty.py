import dataclasses
import math

import pytest
import torch

from linear.problems import SCALES, Toy, make_toy, near, without
from lqf_lightning.linear.held_out import held_out_cross_entropy
from lqf_lightning.linear.held_out_gradient import held_out_gradient
from lqf_lightning.linear.kernel import Kernel, KernelForm
from lqf_lightning.linear.learned_penalty import LearnedPenalty, learn_penalty
from lqf_lightning.linear.problem import QuadraticProblem

BODY = 6
SEED = 0  # gives every class company


def classes_toy(form: KernelForm = "trace", samples: int = 15, seed: int = SEED) -> Toy:
    """Three classes, one-hot targets, which the head's features explain but for some noise."""
    toy = make_toy(form=form, samples=samples, body=BODY, intercept=True, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    head = split(toy)[1]
    weights = torch.randn(head.shape[3], 3, dtype=torch.float64, generator=draw)
    if form == "full":
        scores = torch.einsum("bncp,p->nc", head, weights[:, 0])
    else:
        scores = torch.einsum("bncp,po->no", head, weights)
    scores = scores / scores.std() + 0.5 * torch.randn(scores.shape, dtype=torch.float64, generator=draw)
    target = 15 * torch.nn.functional.one_hot(scores.argmax(1), 3).double()
    return dataclasses.replace(toy, problem=toy.problem.with_(target=target))


def split(toy: Toy):
    cut = toy.features.shape[3] * BODY // (BODY + 4)
    return toy.features[..., :cut], toy.features[..., cut:]


def with_penalty(toy: Toy, result: LearnedPenalty) -> Toy:
    """The same toy whose features have the learned scales."""
    parts = zip(SCALES.items(), split(toy), strict=True)
    features = torch.cat([part * (result.scales[name] / scale) ** 0.5 for (name, scale), part in parts], 3)
    return dataclasses.replace(toy, problem=toy.problem.with_(ridge=result.ridge), features=features)


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("criterion", ["cross_entropy", "press"])
def test_the_loss_is_that_of_refits_at_the_learned_penalty(form, criterion):
    toy = classes_toy(form)
    result = learn_penalty(toy.problem, toy.kernel, criterion=criterion)
    learned = with_penalty(toy, result)
    found = torch.stack([without(learned, [i]).outputs[i] for i in range(15)])
    right = (found.argmax(1) == toy.problem.target.argmax(1)).double().mean()
    assert result.accuracy[result.step] == pytest.approx(float(right))
    if criterion == "press":
        loss, temperature = (found - toy.problem.target).square().sum(1).mean(), 1.0
    else:
        loss, temperature = held_out_cross_entropy(found, toy.problem.target)
    assert result.loss[result.step] == pytest.approx(float(loss), rel=1e-9)
    assert result.temperature == pytest.approx(float(temperature), rel=1e-6)


def prior(result: LearnedPenalty, samples: int) -> float:
    logs = torch.tensor(list(result.share.values()), dtype=torch.float64).log()
    return float(((logs - logs.mean()) / 2.5).square().sum()) / (2 * samples)


@pytest.mark.parametrize("form", ["full", "trace"])
def test_no_other_penalty_nearby_is_better(form):
    toy = classes_toy(form)
    result = learn_penalty(toy.problem, toy.kernel)
    best = float(result.loss[result.step]) + prior(result, 15)
    means = {name: float(one.diagonal(dim1=1, dim2=2).mean()) for name, one in toy.kernel.groups.items()}
    for body in (-1.5, -0.5, 0.0, 0.5, 1.5):
        for ridge in (-1.5, -0.5, 0.0, 0.5, 1.5):
            scales = {"body": result.scales["body"] * math.exp(body), "head": result.scales["head"]}
            problem = toy.problem.with_(ridge=result.ridge * math.exp(ridge))
            loss = held_out_gradient(problem, toy.kernel, scales).loss
            share = {name: scales[name] * means[name] for name in scales}
            other = dataclasses.replace(result, share=share)
            assert loss + prior(other, 15) > best - 1e-3


def test_scales_are_normalized_and_shares_are_parts_of_the_diagonal():
    toy = classes_toy()
    result = learn_penalty(toy.problem, toy.kernel)
    means = {name: float(one.diagonal(dim1=1, dim2=2).mean()) for name, one in toy.kernel.groups.items()}
    whole = sum(means.values())
    assert sum(result.scales[name] * mean for name, mean in means.items()) == pytest.approx(whole)
    for name, mean in means.items():
        assert result.share[name] == pytest.approx(result.scales[name] * mean / whole)


def test_the_group_that_explains_the_target_gets_the_kernel():
    draw = torch.Generator().manual_seed(0)
    parts = {name: torch.randn(40, 3, dtype=torch.float64, generator=draw) for name in ("noise", "signal", "more")}
    target = torch.nn.functional.one_hot(parts["signal"].argmax(1), 3).double()
    kernel = Kernel({name: (part @ part.T)[None] for name, part in parts.items()}, 3, "trace")
    result = learn_penalty(QuadraticProblem(torch.zeros(40, 3), target, 1.0, intercept=True), kernel)
    assert result.share["signal"] > 0.8
    assert result.loss[result.step] < 0.75 * result.loss[0]
    assert result.accuracy[result.step] > result.accuracy[0]
    assert result.step == len(result.loss) - 1 or result.step == int(result.loss.argmin())
    assert len(result.loss) <= 25


def test_results_are_reproducible_and_do_not_depend_on_the_ridge_of_the_problem():
    toy = classes_toy()
    one, two = (learn_penalty(toy.problem.with_(ridge=ridge), toy.kernel) for ridge in (1.0, 77.0))
    assert (one.scales, one.ridge, one.step) == (two.scales, two.ridge, two.step)
    assert torch.equal(one.loss, two.loss)


def test_the_order_of_groups_plays_no_part():
    toy = classes_toy()
    other = Kernel(dict(reversed(toy.kernel.groups.items())), 3, "trace")
    one, two = learn_penalty(toy.problem, toy.kernel), learn_penalty(toy.problem, other)
    assert list(two.scales) == ["head", "body"]
    assert two.scales == pytest.approx(one.scales, rel=1e-6)
    assert two.ridge == pytest.approx(one.ridge, rel=1e-6)


def test_a_group_in_other_units_gets_another_scale_only():
    toy = classes_toy()
    groups = {"body": 1000 * toy.kernel.groups["body"], "head": toy.kernel.groups["head"]}
    one = learn_penalty(toy.problem, toy.kernel)
    two = learn_penalty(toy.problem, Kernel(groups, 3, "trace"))
    ratio = {name: two.scales[name] / two.ridge / (one.scales[name] / one.ridge) for name in groups}
    assert ratio == pytest.approx({"body": 1e-3, "head": 1.0}, rel=1e-6)
    assert two.share == pytest.approx(one.share, rel=1e-6)
    assert near(two.loss, one.loss)


def test_groups_without_a_part_in_the_outputs_are_left_out():
    toy = classes_toy()
    groups = {"dead": torch.zeros(1, 15, 15), **toy.kernel.groups}
    one, two = (learn_penalty(toy.problem, Kernel(some, 3, "trace")) for some in (toy.kernel.groups, groups))
    assert two.scales == {"dead": 1.0, **one.scales}
    assert two.share == {"dead": 0.0, **one.share}


def test_copies_left_out_together_count_as_one_sample_of_double_weight():
    toy = classes_toy()
    twice = torch.arange(15).repeat_interleave(2)
    groups = {name: group[:, twice][:, :, twice] for name, group in toy.kernel.groups.items()}
    problem = toy.problem.with_(initial=toy.problem.initial[twice], target=toy.problem.target[twice])
    copies = learn_penalty(problem, Kernel(groups, 3, "trace"), together=twice, steps=3)
    double = learn_penalty(toy.problem.with_(weight=torch.full((15,), 2.0)), toy.kernel, steps=3)
    assert float(copies.loss[0]) == pytest.approx(float(double.loss[0]), rel=1e-9)
    alone = learn_penalty(problem, Kernel(groups, 3, "trace"), steps=1)
    assert alone.loss[0] < 0.5 * copies.loss[0]  # a copy gives the label away


def test_only_judged_samples_that_have_company_in_their_class_count():
    toy = classes_toy()
    target = toy.problem.target.clone()
    classes = target.argmax(1)
    lonely = int((classes == 2).nonzero()[0])
    target[classes == 2] = target[classes == 0][0]
    target[lonely] = 15 * torch.eye(3, dtype=torch.float64)[2]
    problem, judged = toy.problem.with_(target=target), torch.ones(15, dtype=torch.bool)
    judged[[3, 5]] = False
    result = learn_penalty(problem, toy.kernel, judged=judged, steps=1)
    judged[lonely] = False
    want = held_out_gradient(problem.with_(ridge=result.ridge), toy.kernel, result.scales, judged=judged)
    assert float(result.loss[0]) == pytest.approx(want.loss, rel=1e-9)


def test_a_start_that_is_good_already_needs_few_steps():
    toy = classes_toy()
    cold = learn_penalty(toy.problem, toy.kernel)
    warm = learn_penalty(toy.problem, toy.kernel, start=cold)
    assert float(warm.loss[0]) == pytest.approx(float(cold.loss[cold.step]), rel=1e-9)
    assert len(warm.loss) < len(cold.loss)
    with pytest.raises(ValueError, match="no positive scale for group 'body'"):
        learn_penalty(toy.problem, toy.kernel, start=dataclasses.replace(cold, scales={"head": 1.0}))


def test_steps_are_watched_and_limited():
    toy, seen = classes_toy(), []
    result = learn_penalty(toy.problem, toy.kernel, steps=3, watch=lambda steps: (seen.append(1) or s for s in steps))
    assert len(seen) == len(result.loss) == len(result.accuracy) == 3
    assert int(result.loss.argmin()) == result.step


def test_a_single_output_is_judged_by_squares():
    toy = make_toy(outputs=1, samples=12)
    result = learn_penalty(toy.problem, toy.kernel, criterion="press")
    assert bool(result.accuracy.isnan().all())
    assert result.temperature == 1
    with pytest.raises(ValueError, match="choose by 'press'"):
        learn_penalty(toy.problem, toy.kernel)


def test_where_nothing_beats_guessing_the_start_is_returned_with_an_infinite_temperature():
    target = torch.eye(3, dtype=torch.float64).repeat(3, 1)
    problem = QuadraticProblem(torch.zeros(9, 3), target, 1.0, intercept=True)
    result = learn_penalty(problem, Kernel({"a": torch.eye(9)[None], "b": torch.eye(9)[None]}, 3, "trace"))
    assert (result.temperature, result.step) == (math.inf, 0)
    assert result.loss.tolist() == pytest.approx([math.log(3)] * 4)
    assert result.scales == pytest.approx({"a": 1.0, "b": 1.0})
    assert result.ridge == pytest.approx(0.2)


def test_ridges_at_which_the_system_is_indefinite_are_avoided():
    toy = classes_toy()
    shift = 0.3 * torch.eye(15, dtype=torch.float64) * toy.kernel.groups["body"].diagonal(dim1=1, dim2=2).mean()
    low = Kernel({"body": toy.kernel.groups["body"] - shift, "head": toy.kernel.groups["head"]}, 3, "trace")
    result = learn_penalty(toy.problem, low)
    assert result.loss[result.step] < math.inf
    with pytest.raises(ValueError, match="negative eigenvalues beyond the ridge"):
        learn_penalty(toy.problem, Kernel({"body": 2 * torch.eye(15).flip(0)[None] + 0.01}, 3, "trace"))


def test_what_cannot_be_learned_from_is_refused():
    toy = classes_toy()
    problem, kernel = toy.problem, toy.kernel
    same = problem.with_(target=problem.target[:1].expand(15, 3))
    with pytest.raises(ValueError, match=r"15 samples to judge have 1 classes.*method\.metric=identity"):
        learn_penalty(same, kernel)
    few = Kernel({"head": torch.eye(3)[None]}, 3, "trace")
    with pytest.raises(ValueError, match=r"0 samples can be judged, expected two.*a class needs a second sample"):
        learn_penalty(QuadraticProblem(torch.zeros(3, 3), torch.eye(3), 1.0), few)
    one = QuadraticProblem(torch.zeros(1, 1), torch.ones(1, 1), 1.0)
    with pytest.raises(ValueError, match="1 samples can be judged"):
        learn_penalty(one, Kernel({"head": torch.ones(1, 1, 1)}, 1), criterion="press")
    with pytest.raises(ValueError, match="the kernel is zero"):
        learn_penalty(problem, Kernel({"head": torch.zeros(1, 15, 15)}, 3, "trace"))
    with pytest.raises(ValueError, match="'head' is not finite or negative"):
        learn_penalty(problem, Kernel({"head": torch.full((1, 15, 15), torch.nan)}, 3, "trace"))
    with pytest.raises(ValueError, match=r"`judged` must be bool \(15,\)"):
        learn_penalty(problem, kernel, judged=torch.arange(15))
    with pytest.raises(ValueError, match=r"whole numbers \(15,\)"):
        learn_penalty(problem, kernel, together=torch.arange(4))
    with pytest.raises(ValueError, match="at least one step, got 0"):
        learn_penalty(problem, kernel, steps=0)
