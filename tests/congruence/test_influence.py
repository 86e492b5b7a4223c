import pytest
import torch
from torch.nn.functional import cross_entropy

from lqf_lightning.congruence.influence import influence_loss


def problem(samples=6, width=4, old_width=3, classes=5):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  three uses
    return draw(samples, width), draw(classes, old_width), draw(classes)


def test_it_is_the_loss_of_the_old_head_on_the_first_features():
    features, weight, bias = problem()
    target = torch.tensor([0, 4, 2, 1, 3, 0])
    by_hand = cross_entropy(features[:, :3] @ weight.T + bias, target)
    assert influence_loss(features, weight, bias, target).item() == pytest.approx(by_hand.item(), rel=1e-14)
    without = cross_entropy(features[:, :3] @ weight.T, target)
    assert influence_loss(features, weight, None, target).item() == pytest.approx(without.item(), rel=1e-14)


def test_only_the_first_features_of_known_samples_have_a_gradient():
    features, weight, bias = problem()
    for tensor in (features, weight, bias):
        tensor.requires_grad_()
    target = torch.tensor([0, -1, 2, -1, 3, 0])
    influence_loss(features, weight, bias, target).backward()
    with torch.no_grad():
        probability = (features[:, :3] @ weight.T + bias).softmax(-1)
        probability[torch.arange(6), target.clamp(min=0)] -= 1
        expected = probability @ weight / 6
        expected[[1, 3]] = 0
    assert torch.allclose(features.grad[:, :3], expected, rtol=1e-12)
    assert features.grad[:, 3].abs().max() == 0
    assert weight.grad is None
    assert bias.grad is None


def test_shares_of_a_batch_average_to_the_batch_whatever_is_known():
    features, weight, bias = problem()
    target = torch.tensor([-1, -1, 2, -1, 3, 0])
    halves = [influence_loss(features[rows], weight, bias, target[rows]) for rows in (slice(0, 3), slice(3, 6))]
    assert sum(halves).item() / 2 == pytest.approx(influence_loss(features, weight, bias, target).item(), rel=1e-14)


@pytest.mark.parametrize("samples", [0, 3])
def test_a_batch_without_known_classes_is_zero_with_a_graph(samples):
    features, weight, bias = problem(samples)
    features.requires_grad_()
    loss = influence_loss(features, weight, bias, torch.full((samples,), -1))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros(samples, 4).double())


def test_autocast_changes_nothing():
    features, weight, bias = (tensor.float() for tensor in problem())
    target = torch.tensor([0, 4, 2, 1, 3, 0])
    expected = influence_loss(features, weight, bias, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(influence_loss(features, weight, bias, target), expected)
        half = influence_loss(features.bfloat16(), weight, bias, target)
    assert torch.equal(half, influence_loss(features.bfloat16().float(), weight, bias, target))


@pytest.mark.parametrize(
    ("features", "target", "message"),
    [
        ((6, 2), (6,), r"has 2 features, fewer than the 3.*method\.influence=0"),
        ((6, 4, 1), (6,), r"vectors \(B, d\).*got \(6, 4, 1\)"),
        ((6, 4), (6, 1), r"one class each, got \(6, 4\) and \(6, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(features, target, message):
    _, weight, bias = problem()
    with pytest.raises(ValueError, match=message):
        influence_loss(torch.zeros(features), weight, bias, torch.zeros(target, dtype=torch.int64))
