import pytest
import torch
from torch.nn.functional import cross_entropy

from lqf_lightning.congruence.distances import kl_distance, logit_distance
from lqf_lightning.congruence.focal_filter import focal_mean, focal_weights, focus

# right and wrong, in all four combinations, and a class (2) that the old model does not know
TARGET = torch.tensor([0, 1, 0, 1, 2])
OLD_TARGET = torch.tensor([1, 0, 1, 0, -1])
OLD = torch.tensor([[0.0, 2.0], [3.0, 1.0], [1.0, 0.5], [0.2, 1.0], [4.0, 0.0]]).double()
NEW = torch.tensor([[5.0, 0.0, 0.0], [2.0, 0.0, 1.0], [4.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 3.0]]).double()
OLD_LOSSES = cross_entropy(OLD, OLD_TARGET.clamp(min=0), reduction="none").tolist()
NEW_LOSSES = cross_entropy(NEW, TARGET, reduction="none").tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("focal", [1, 1, 0, 0, 0]),
        ("negative_flip", [0, 1, 0, 0, 0]),
        ("new_wrong", [0, 1, 0, 1, 0]),
        ("all", [1, 1, 1, 1, 0]),
        ("likelihood", [OLD[i].softmax(-1)[k].item() for i, k in enumerate([1, 0, 1, 0])] + [0]),
        ("better", [float(o <= n) for o, n in zip(OLD_LOSSES[:4], NEW_LOSSES[:4], strict=True)] + [0]),
    ],
)
def test_focus_by_hand(name, expected):
    got = focus(name, NEW.clone().requires_grad_(), OLD.clone().requires_grad_(), TARGET, OLD_TARGET)
    assert got.tolist() == pytest.approx(expected, rel=1e-14)
    assert not got.requires_grad


def test_better_compares_losses_and_not_decisions():
    old, new = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.0], [2.0, 0.0]])  # all right
    assert focus("better", new, old, torch.tensor([0, 0]), torch.tensor([0, 0])).tolist() == [1.0, 0.0]
    assert focus("better", old, old, torch.tensor([0, 1]), torch.tensor([0, 1])).tolist() == [1.0, 1.0]  # not larger


def test_a_class_that_the_old_model_does_not_know_has_weight_zero():
    for name in ("focal", "negative_flip", "new_wrong", "all", "likelihood", "better"):
        weights = focal_weights(focus(name, NEW, OLD, TARGET, OLD_TARGET), OLD_TARGET, alpha=2.0, beta=3.0)
        assert weights[4] == 0
        assert weights[:4].min() >= 2


def test_weights_are_alpha_and_beta_more_in_focus():
    assert focal_weights(torch.tensor([0.0, 1.0, 0.25]), torch.tensor([0, 1, 1]), 0.5, 4.0).tolist() == [0.5, 4.5, 1.5]


def batch(number=32, classes=10, seed=0):
    """A reference that is right on half of the samples, and a new model nearby."""
    generator = torch.Generator().manual_seed(seed)
    old = 3 * torch.randn(number, classes, generator=generator, dtype=torch.float64)
    new = old + torch.randn(number, classes, generator=generator, dtype=torch.float64)
    target = torch.where(torch.arange(number) % 2 == 0, old.argmax(-1), old.argmin(-1))
    return new, old, target


def pull(new, old, target, alpha, beta, distance=kl_distance):
    """Gradient of the weighted mean distance with respect to the new outputs, and its value."""
    new = new.detach().requires_grad_()
    weights = focal_weights(focus("focal", new, old, target, target), target, alpha, beta)
    value = focal_mean(distance(new, old), weights)
    return torch.autograd.grad(value, new)[0], value.item()


def test_samples_that_the_old_model_gets_wrong_are_not_pulled_without_alpha():
    new, old, target = batch()
    gradient, _ = pull(new, old, target, alpha=0.0, beta=1.0)
    right = old.argmax(-1) == target
    assert right.tolist() == [True, False] * 16
    assert torch.equal(gradient[~right], torch.zeros(16, 10).double())
    assert gradient[right].norm(dim=-1).min() > 1e-4


def test_weights_of_one_column_would_pull_every_sample_alike():
    # The mistake that the shape checks are there for: (B,) times (B, 1) pairs every sample with every weight.
    new, old, target = batch()
    outputs = new.clone().requires_grad_()
    distances = kl_distance(outputs, old)
    weights = focal_weights(focus("focal", new, old, target, target), target, alpha=0.0, beta=1.0)
    paired = (distances * weights.unsqueeze(1)).mean()
    assert paired.item() == pytest.approx((distances.mean() * weights.mean()).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(paired, outputs)
    wrong = old.argmax(-1) != target
    assert gradient[wrong].norm(dim=-1).min() > 1e-3
    plain, _ = pull(new, old, target, alpha=1.0, beta=0.0)
    assert torch.allclose(gradient, weights.mean() * plain, rtol=1e-10)  # ordinary distillation, in disguise


@pytest.mark.parametrize(
    ("values", "weights"), [((4,), (4, 1)), ((4, 1), (4,)), ((4, 1), (4, 1)), ((4,), (1,)), ((4,), ()), ((), ())]
)
def test_shapes_that_would_broadcast_are_refused(values, weights):
    with pytest.raises(ValueError, match=r"one number per sample, shape \(B,\), got.*mix samples"):
        focal_mean(torch.zeros(values), torch.zeros(weights))


@pytest.mark.parametrize("distance", [kl_distance, logit_distance])
def test_without_beta_it_is_ordinary_distillation_and_beta_only_rescales_where_the_old_model_is_always_right(distance):
    new, old, target = batch()
    assert pull(new, old, target, 1.0, 0.0, distance)[1] == pytest.approx(distance(new, old).mean().item(), rel=1e-14)
    right = old.argmax(-1)
    single, one = pull(new, old, right, 1.0, 0.0, distance)
    scaled, many = pull(new, old, right, 0.5, 4.0, distance)
    assert many == pytest.approx(4.5 * one, rel=1e-13)
    assert torch.allclose(scaled, 4.5 * single, rtol=1e-12)


def test_gradients_are_those_of_the_formulas():
    new, old, target = batch()
    weights = (1 + 5 * (old.argmax(-1) == target).double()).unsqueeze(1) / 32
    half = pull(new, old, target, 1.0, 5.0, lambda n, o: logit_distance(n, o, "sum"))[0]
    assert torch.allclose(half, weights * (new - old), rtol=1e-12)
    hot = pull(new, old, target, 1.0, 5.0)[0]
    expected = weights * 100 * ((new / 100).softmax(-1) - (old / 100).softmax(-1))
    assert torch.allclose(hot, expected, rtol=1e-7, atol=1e-13)


def test_order_does_not_matter_and_a_batch_twice_is_the_batch():
    new, old, target = batch()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    gradient, value = pull(new, old, target, 1.0, 5.0)
    permuted, same = pull(new[order], old[order], target[order], 1.0, 5.0)
    assert same == pytest.approx(value, rel=1e-13)
    assert torch.allclose(permuted, gradient[order], rtol=1e-13, atol=0)
    _, twice = pull(new.repeat(2, 1), old.repeat(2, 1), target.repeat(2), 1.0, 5.0)
    assert twice == pytest.approx(value, rel=1e-13)


def test_samples_of_unknown_classes_count_in_the_size_of_the_batch():
    values, known = torch.tensor([3.0, 5.0, 7.0, 9.0]), torch.tensor([0, -1, 1, -1])
    weights = focal_weights(torch.ones(4), known, 1.0, 1.0)
    assert focal_mean(values, weights).item() == (2 * 3 + 2 * 7) / 4


def test_a_batch_without_samples_is_zero_with_a_graph():
    new = torch.zeros(0, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    weights = focal_weights(focus("focal", new, torch.zeros(0, 3), none, none), none)
    value = focal_mean(logit_distance(new, torch.zeros(0, 3)), weights)
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: focus("focus", NEW, OLD, TARGET, OLD_TARGET),
            r"better, got 'focus'.*method\.filter=focal",
        ),
        (lambda: focus("focal", NEW, OLD, TARGET.unsqueeze(1), OLD_TARGET), r"`target`.*got \(5, 1\)"),
        (lambda: focus("focal", NEW, OLD, TARGET, OLD_TARGET[:1]), r"`old_target`.*got \(1,\)"),
        (lambda: focus("focal", NEW, OLD[:2], TARGET, OLD_TARGET), r"outputs \(5, 3\) and \(2, 2\)"),
        (lambda: focal_weights(torch.ones(4, 1), torch.ones(4)), r"got \(4, 1\) and \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
