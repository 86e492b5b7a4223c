import math

import pytest
import torch
from torch import Tensor

from linear.problems import SCALES, make_toy, near, without
from lqf_lightning.linear.held_out import held_out_cross_entropy
from lqf_lightning.linear.held_out_gradient import HeldOutGradient, bordered_inverse, held_out_gradient
from lqf_lightning.linear.kernel import Kernel

FORMS = ["full", "diagonal", "trace", "last_layer"]
WEIGHTS = [1.0, 0.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0, 0.2]
TOGETHER = torch.tensor([4, 4, 1, 0, 1, 4, 7, 9, 1])
JUDGED = torch.tensor([True, True, True, False, True, True, False, True, True])
OPTIONS = {
    "alone": ({}, None, None),
    "intercept": ({"intercept": True}, None, None),
    "weights": ({"intercept": True, "weights": WEIGHTS}, None, JUDGED),
    "sets": ({"intercept": True, "weights": WEIGHTS}, TOGETHER, JUDGED),
    "sets, no intercept": ({}, TOGETHER, None),
}


def cases(test):
    test = pytest.mark.parametrize("form", FORMS)(test)
    return pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)(test)


@cases
@pytest.mark.parametrize("outputs", [1, 3])
def test_predictions_and_losses_are_those_of_refits_in_weight_space(form, options, outputs):
    (arguments, together, judged) = options
    toy = make_toy(form=form, outputs=outputs, **arguments)
    sets = torch.arange(9) if together is None else together
    refits = [without(toy, (sets == sets[i]).nonzero().flatten().tolist()).outputs[i] for i in range(9)]
    weight = toy.problem.root_weight.square()[:, 0] * (1 if judged is None else judged.double())
    present = toy.problem.root_weight[:, 0] > 0
    want = torch.stack(refits)
    got = held_out_gradient(toy.problem, toy.kernel, SCALES, criterion="press", judged=judged, together=together)
    assert near(got.prediction[present], want[present])
    assert bool(got.prediction[~present].isnan().all())
    squares = (want - toy.problem.target).square().sum(1)
    assert got.loss == pytest.approx(float((weight * squares).sum() / weight.sum()), rel=1e-9)
    if outputs == 1:
        assert math.isnan(got.accuracy)
        return
    right = (want.argmax(1) == toy.problem.target.argmax(1)).double()
    assert got.accuracy == pytest.approx(float((weight * right).sum() / weight.sum()), rel=1e-12)
    entropy = held_out_gradient(toy.problem, toy.kernel, SCALES, judged=judged, together=together)
    loss, temperature = held_out_cross_entropy(want, toy.problem.target, weight)
    assert entropy.loss == pytest.approx(float(loss), rel=1e-9)
    assert entropy.temperature == pytest.approx(float(temperature), rel=1e-6)


def separated(form, arguments, outputs=3):
    """A toy whose held-out predictions beat guessing: targets are mostly linear in its features."""
    toy = make_toy(form=form, outputs=outputs, ridge=0.7, body=5, **arguments)
    draw = torch.Generator().manual_seed(5)
    weights = torch.randn(toy.features.shape[3], outputs, dtype=torch.float64, generator=draw)
    if form in ("full", "diagonal"):  # one output's weights move that output alone, or all of them at once
        moved = torch.einsum("bncp,p->nbc", toy.features, weights[:, 0]).flatten(1)
    else:
        moved = torch.einsum("bncp,po->no", toy.features, weights)
    share = 0.8 if form in ("full", "diagonal") else 0.3  # what can be learned, but not without errors
    noise = share * moved.std() * torch.randn(*moved.shape, dtype=torch.float64, generator=draw)
    return toy.problem.with_(target=toy.problem.initial + moved + noise), toy.kernel


@cases
@pytest.mark.parametrize("criterion", ["cross_entropy", "press"])
def test_derivatives_are_finite_differences(form, options, criterion):
    arguments, together, judged = options
    problem, kernel = separated(form, arguments)

    def at(body: float, head: float, ridge: float) -> HeldOutGradient:
        scales = {"body": 0.5 * math.exp(body), "head": 2 * math.exp(head)}
        changed = problem.with_(ridge=problem.ridge * math.exp(ridge))
        return held_out_gradient(changed, kernel, scales, criterion=criterion, judged=judged, together=together)

    here, h = at(0, 0, 0), 1e-4
    if criterion == "cross_entropy":
        assert here.temperature < 1e3
    slopes = [(at(*(h * unit)).loss - at(*(-h * unit)).loss) / (2 * h) for unit in torch.eye(3)]
    got = [here.by_scale["body"], here.by_scale["head"], here.by_ridge]
    # Central differences err by h^2 times the third derivative, which is of the size of the derivatives here.
    assert near(torch.tensor(got), torch.tensor(slopes), 1e-6)
    assert max(map(abs, got)) > 1e-3


def dense_loss(kernel: Tensor, problem, outputs: int) -> Tensor:
    """Leave-one-out cross-entropy at a given temperature by the graph of a dense inverse, intercept as a border."""
    n = problem.samples
    border = torch.eye(outputs, dtype=torch.float64).repeat(n, 1)
    system = torch.cat([
        torch.cat([kernel + problem.ridge * torch.eye(n * outputs, dtype=torch.float64), border], 1),
        torch.cat([border.T, torch.zeros(outputs, outputs, dtype=torch.float64)], 1),
    ])
    inverse = torch.linalg.inv(system)[: n * outputs, : n * outputs]
    beta = (inverse @ problem.residual.flatten()).view(n, outputs, 1)
    own = torch.stack([inverse[i * outputs : (i + 1) * outputs, i * outputs : (i + 1) * outputs] for i in range(n)])
    return problem.target - torch.linalg.solve(own, beta)[..., 0]


def test_derivatives_are_those_of_a_dense_graph():
    problem, kernel = separated("full", {"intercept": True})
    here = held_out_gradient(problem, kernel, SCALES)
    logs = {name: torch.tensor(math.log(scale), requires_grad=True) for name, scale in SCALES.items()}
    total = sum(log.double().exp() * kernel.groups[name][0] for name, log in logs.items())
    scores = dense_loss(total, problem, 3) / here.temperature
    torch.nn.functional.cross_entropy(scores, problem.target.argmax(1)).backward()
    for name, log in logs.items():
        assert here.by_scale[name] == pytest.approx(float(log.grad), rel=1e-5), name  # the leaf is single precision


def test_scales_and_ridge_times_a_factor_are_the_same_model():
    problem, kernel = separated("full", {"intercept": True})
    one = held_out_gradient(problem, kernel, SCALES)
    other = held_out_gradient(problem.with_(ridge=7 * problem.ridge), kernel, {k: 7 * s for k, s in SCALES.items()})
    assert near(other.prediction, one.prediction)
    assert other.by_scale == pytest.approx(one.by_scale, rel=1e-7)
    assert one.by_ridge == pytest.approx(-sum(one.by_scale.values()))


def test_groups_without_a_scale_are_frozen():
    problem, kernel = separated("full", {"intercept": True})
    alone = held_out_gradient(problem, Kernel({"head": kernel.groups["head"]}, 3), {"head": 2.0})
    for scales in ({"head": 2.0}, {"head": 2.0, "body": 0.0}):
        got = held_out_gradient(problem, kernel, scales)
        assert (got.loss, got.by_scale) == (alone.loss, {"body": 0.0, **alone.by_scale})


def test_single_precision_kernels_are_differentiated_in_double_precision():
    problem, kernel = separated("trace", {"intercept": True})
    rounded = Kernel({name: group.float() for name, group in kernel.groups.items()}, 3, "trace")
    want = held_out_gradient(problem, Kernel({n: g.double() for n, g in rounded.groups.items()}, 3, "trace"), SCALES)
    got = held_out_gradient(problem, rounded, SCALES)
    assert (got.loss, got.by_scale) == (pytest.approx(want.loss, rel=1e-14), pytest.approx(want.by_scale, rel=1e-12))


def test_rows_that_are_looked_at_in_parts_give_the_same(monkeypatch):
    problem, kernel = separated("full", {"intercept": True})
    want = held_out_gradient(problem, kernel, SCALES, together=TOGETHER)
    monkeypatch.setattr("lqf_lightning.linear.held_out_gradient._CHUNK", 30)
    monkeypatch.setattr("lqf_lightning.linear.held_out_sets._CHUNK", 30)
    assert held_out_gradient(problem, kernel, SCALES, together=TOGETHER).by_scale == pytest.approx(want.by_scale)


def test_guesses_that_no_temperature_improves_are_flat():
    toy = make_toy(form="trace", intercept=True)
    target = torch.eye(3, dtype=torch.float64).repeat(3, 1)
    problem = toy.problem.with_(initial=torch.zeros(9, 3), target=target, ridge=1e9)  # the mean of the others
    result = held_out_gradient(problem, toy.kernel, SCALES)
    assert (result.loss, result.temperature) == (pytest.approx(math.log(3)), math.inf)
    assert result.by_scale == {"body": 0.0, "head": 0.0}


def test_what_cannot_be_held_out_is_refused():
    toy = make_toy(intercept=True)
    problem, kernel = toy.problem, toy.kernel
    with pytest.raises(ValueError, match="without linear terms"):
        held_out_gradient(make_toy(linear=True).problem, kernel)
    with pytest.raises(ValueError, match=r"`judged` must be bool \(9,\), got torch.int64"):
        held_out_gradient(problem, kernel, judged=torch.arange(9))
    with pytest.raises(ValueError, match="no sample is judged"):
        held_out_gradient(problem, kernel, judged=torch.zeros(9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"whole numbers \(9,\), got torch.float32"):
        held_out_gradient(problem, kernel, together=torch.zeros(9))
    with pytest.raises(ValueError, match="none to fit the intercept"):
        held_out_gradient(problem, kernel, together=torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match="9 training samples with 3 outputs"):
        held_out_gradient(problem, Kernel({"all": torch.eye(9)[None]}, 3))
    with pytest.raises(ValueError, match="single output"):
        held_out_gradient(make_toy(outputs=1).problem, make_toy(outputs=1).kernel)
    with pytest.raises(ValueError, match="eigenvalue below -1, its mean diagonal"):
        bordered_inverse(problem, Kernel({"all": -2 * torch.eye(27)[None]}, 3))
