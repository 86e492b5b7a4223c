import math

import pytest
import torch
from torch.nn.functional import kl_div

from lqf_lightning.congruence.distances import kl_distance, logit_difference_inhibition, logit_distance

DISTANCES = {
    "kl": kl_distance,
    "kl, cold": lambda new, old: kl_distance(new, old, temperature=1.0),
    "logits": logit_distance,
    "logits, sum": lambda new, old: logit_distance(new, old, "sum"),
    "logits, centered": lambda new, old: logit_distance(new, old, centered=True),
    "ldi": logit_difference_inhibition,
    "ldi, all options": lambda new, old: logit_difference_inhibition(
        new, old, 0.1, 1.5, 3, torch.arange(len(new)) % 5, True
    ),
}


def outputs(samples=6, classes=5, gap=0.3, seed=0, dtype=torch.float64):
    """Outputs of an old model, of size 3, and of a new one nearby; exactly representable in single precision."""
    generator = torch.Generator().manual_seed(seed)
    old = 3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    new = old + gap * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return new.float().to(dtype), old.float().to(dtype)


def slope(distance, new, old):
    """Gradient of the sum of the distances with respect to the new outputs."""
    new = new.detach().requires_grad_()
    return torch.autograd.grad(distance(new, old).sum(), new)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_kl_is_the_divergence_from_old_to_new_times_the_squared_temperature(temperature):
    new, old = outputs(gap=1.0)
    log_new, log_old = (new / temperature).log_softmax(-1), (old / temperature).log_softmax(-1)
    expected = temperature**2 * kl_div(log_new, log_old, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(kl_distance(new, old, temperature), expected, rtol=1e-10)
    other_way = temperature**2 * kl_div(log_old, log_new, reduction="none", log_target=True).sum(-1)
    assert not torch.allclose(expected, other_way, rtol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_the_gradient_of_kl_is_the_difference_of_the_probabilities_times_the_temperature(temperature):
    new, old = outputs()
    expected = temperature * ((new / temperature).softmax(-1) - (old / temperature).softmax(-1))
    got = slope(lambda n, o: kl_distance(n, o, temperature), new, old)
    assert torch.allclose(got, expected, rtol=1e-8, atol=1e-14)
    assert got.sum(-1).abs().max() < 1e-13


def test_kl_of_a_thousand_classes_is_accurate_in_single_precision():
    new, old = outputs(64, 1000)
    exact, exact_slope = kl_distance(new, old), slope(kl_distance, new, old)
    got = kl_distance(new.float(), old.float())
    assert got.dtype == torch.float32
    assert (got / exact - 1).abs().max() < 1e-5  # 1.3e-6 here
    got_slope = slope(kl_distance, new.float(), old.float())
    assert (got_slope - exact_slope).norm() / exact_slope.norm() < 5e-5  # 1.3e-5 here

    log_new, log_old = (new.float() / 100).log_softmax(-1), (old.float() / 100).log_softmax(-1)
    usual = 100**2 * kl_div(log_new, log_old, reduction="none", log_target=True).sum(-1)
    assert (usual / exact - 1).abs().max() > 1e-2  # why the form matters


def test_no_distance_is_negative_or_off_zero_where_nothing_changed():
    for scale in (1e-6, 1e-3, 1.0, 30.0):
        new, old = outputs(200, 50, gap=scale, dtype=torch.float32)
        for name, distance in DISTANCES.items():
            assert distance(new, old).min() >= 0, name
            assert torch.equal(distance(old, old), torch.zeros(200)), name
            assert slope(distance, old, old).abs().max() < 1e-8, name  # rounding of two equal probabilities


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_kl_of_outputs_that_disagree_completely_is_finite(temperature):
    old, new = torch.tensor([[0.0, 300.0, -300.0]]), torch.tensor([[300.0, 0.0, 5.0]])
    exact = kl_div(
        (new.double() / temperature).log_softmax(-1), (old.double() / temperature).log_softmax(-1),
        reduction="none", log_target=True,
    ).sum(-1) * temperature**2  # fmt: skip
    assert kl_distance(new, old, temperature).item() == pytest.approx(exact.item(), rel=1e-6)
    expected = temperature * ((new / temperature).softmax(-1) - (old / temperature).softmax(-1))
    assert torch.allclose(slope(lambda n, o: kl_distance(n, o, temperature), new, old), expected, rtol=1e-5, atol=1e-6)


def test_hot_kl_tends_to_half_the_centered_distance_like_one_over_the_temperature():
    new, old = outputs(64, 100)
    limit = logit_distance(new, old, centered=True) / 2
    errors = [(kl_distance(new, old, t) / limit - 1).abs().mean().item() for t in (1e2, 1e3, 1e4)]
    assert errors[0] < 0.05
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([10, 10], rel=0.1)


@pytest.mark.parametrize("name", DISTANCES)
def test_only_kl_and_the_centered_distance_ignore_a_constant(name):
    new, old = outputs()
    shift = torch.linspace(-2, 2, len(new), dtype=torch.float64).unsqueeze(1)
    got, moved = DISTANCES[name](new, old), DISTANCES[name](new + shift, old)
    assert torch.allclose(got, moved, rtol=1e-9) == (name.startswith("kl") or name == "logits, centered")


def test_logit_distances_and_their_gradients_by_hand():
    old, new = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[2.0, 0.0, 3.5]]).double()
    gap = torch.tensor([[1.0, -2.0, 0.5]]).double()
    assert logit_distance(new, old).item() == pytest.approx(5.25 / 3)
    assert logit_distance(new, old, "sum").item() == pytest.approx(5.25 / 2)
    assert logit_distance(new, old, centered=True).item() == pytest.approx((5.25 - 0.25 / 3) / 3)  # mean of gap -1/6
    assert torch.allclose(slope(logit_distance, new, old), 2 / 3 * gap)
    assert torch.allclose(slope(DISTANCES["logits, sum"], new, old), gap)
    assert torch.allclose(slope(DISTANCES["logits, centered"], new, old), 2 / 3 * (gap + 1 / 6))


def test_inhibition_without_a_margin_is_the_squared_distance():
    new, old = outputs()
    assert torch.equal(logit_difference_inhibition(new, old), logit_distance(new, old))


def test_inhibition_within_the_margin_is_zero_with_zero_gradient():
    new, old = outputs()
    margin = (new - old).abs().max().item()
    for power in (1.0, 1.5, 2.0, 3.0):

        def inhibited(n, o, power=power):
            return logit_difference_inhibition(n, o, margin, power)

        assert torch.equal(inhibited(new, old), torch.zeros(len(new)).double())
        assert torch.equal(slope(inhibited, new, old), torch.zeros_like(new))


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_inhibition_beyond_the_margin_pulls_with_the_power_of_the_excess(power, margin):
    new, old = outputs()
    new[0, 0] = old[0, 0]  # no change at all: no pull, and no division by zero
    new[1, 1] = old[1, 1] + margin
    gap = new - old
    excess = (gap.abs() - margin).clamp(min=0)
    expected = torch.where(excess > 0, power * excess ** (power - 1) * gap.sign(), 0.0) / 5
    got = slope(lambda n, o: logit_difference_inhibition(n, o, margin, power), new, old)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-15)
    assert got[0, 0] == 0
    assert got[1, 1] == pytest.approx(0, abs=1e-6)


def test_inhibition_counts_the_classes_that_it_is_told_to():
    new, old = outputs(7, 6)
    label = torch.tensor([0, 1, 2, 3, 4, 5, -1])
    for top_k, exclude, one_sided in [(2, None, False), (2, label, True), (None, label, False), (6, None, True)]:
        expected = []
        for row in range(7):
            ranked = sorted(range(6), key=lambda k: -old[row, k].item())
            ranked = [k for k in ranked if exclude is None or k != exclude[row]][:top_k]
            gaps = [(new - old)[row, k].item() for k in ranked]
            costs = [max((g if one_sided else abs(g)) - 0.05, 0) ** 3 for g in gaps]
            expected.append(math.fsum(costs) / len(costs))
        got = logit_difference_inhibition(new, old, 0.05, 3.0, top_k, exclude, one_sided)
        assert got.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_samples_do_not_know_of_each_other(name):
    new, old = outputs(6, 5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    if "options" in name:  # this one excludes a class by position in the batch
        order = torch.arange(6)
    distance = DISTANCES[name]
    assert torch.equal(distance(new[order], old[order]), distance(new, old)[order])
    assert torch.equal(slope(distance, new[order], old[order]), slope(distance, new, old)[order])
    reduced = slope(lambda n, o: distance(n, o)[:1], new, old)
    assert reduced[1:].abs().max() == 0
    assert reduced[0].abs().max() > 0


@pytest.mark.parametrize("name", DISTANCES)
def test_autocast_and_half_precision_change_nothing(name):
    new, old = outputs(dtype=torch.float32)
    expected, expected_slope = DISTANCES[name](new, old), slope(DISTANCES[name], new, old)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(DISTANCES[name](new, old), expected)
        assert torch.equal(slope(DISTANCES[name], new, old), expected_slope)
        rounded = DISTANCES[name](new.bfloat16(), old)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, DISTANCES[name](new.bfloat16().float(), old))
    both = new.bfloat16(), old.bfloat16()
    assert torch.equal(DISTANCES[name](*both), DISTANCES[name](*(each.float() for each in both)))


@pytest.mark.parametrize("name", DISTANCES)
def test_a_batch_without_samples_has_no_distances(name):
    new = torch.zeros(0, 5, requires_grad=True)
    got = DISTANCES[name](new, torch.zeros(0, 5))
    assert got.shape == (0,)
    got.sum().backward()
    assert new.grad.shape == (0, 5)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 3), (1, 3)), ((4,), (4,)), ((4, 3, 1), (4, 3, 1))])
def test_outputs_that_do_not_match_are_refused(name, shapes):
    with pytest.raises(ValueError, match=r"same shape \(B, C\), got.*SharedClasses"):
        DISTANCES[name](*map(torch.zeros, shapes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kl_distance(x, x, 0.0), r"got 0\.0.*method\.temperature=100"),
        (lambda x: kl_distance(x, x, math.nan), r"got nan.*method\.temperature=100"),
        (lambda x: logit_distance(x, x, "max"), r"'max'.*method\.class_reduction=mean"),
        (lambda x: logit_difference_inhibition(x, x, -0.1), r"got -0\.1.*method\.margin=0"),
        (lambda x: logit_difference_inhibition(x, x, power=0.5), r"got 0\.5.*method\.power=2"),
        (lambda x: logit_difference_inhibition(x, x, top_k=0), r"got 0.*method\.top_k=1"),
        (lambda x: logit_difference_inhibition(x, x, top_k=4), r"the 3 classes.*got 4.*method\.top_k=1"),
        (lambda x: logit_difference_inhibition(x, x, top_k=3, exclude=torch.zeros(2)), r"the 2 classes.*got 3"),
        (lambda x: logit_difference_inhibition(x, x, exclude=torch.zeros(2, 1)), r"shape \(2,\), got \(2, 1\)"),
    ],
)
def test_wrong_options_name_the_override(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
