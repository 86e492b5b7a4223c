import math

import pytest
import torch

from lqf_lightning.forgetting.activation_distance import activation_distance


def logits(seed, samples=7, classes=4, scale=3.0):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(samples, classes, generator=draw, dtype=torch.float64)


def by_hand(first, second, order, temperature=1.0):
    total = 0.0
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        shares = [[math.exp(v / temperature) / sum(math.exp(u / temperature) for u in row) for v in row]
                  for row in (one, other)]  # fmt: skip
        total += sum(abs(a - b) ** order for a, b in zip(*shares, strict=True)) ** (1 / order)
    return total / len(first)


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_it_is_the_mean_over_samples_of_the_named_norm(norm, order):
    found = activation_distance(logits(0), logits(1), norm=norm, temperature=2.0)
    assert found == pytest.approx(by_hand(logits(0), logits(1), order, 2.0), rel=1e-12)


def test_a_model_is_at_distance_zero_from_itself_and_from_itself_with_shifted_outputs():
    assert activation_distance(logits(0), logits(0)) == 0.0
    assert activation_distance(logits(0), logits(0) + 5.0) == pytest.approx(0.0, abs=1e-14)


def test_outputs_of_any_size_are_compared():
    huge = torch.tensor([[1e30, 0.0], [0.0, -1e30]], dtype=torch.float64)
    assert activation_distance(huge, -huge) == 2.0


def test_hot_softmax_sees_the_plain_distance_of_centered_outputs():
    first, second = logits(0), logits(1)
    centered = (first - first.mean(1, keepdim=True)) - (second - second.mean(1, keepdim=True))
    expected = float(centered.abs().sum(1).mean()) / (4 * 1e6)
    assert activation_distance(first, second, temperature=1e6) == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="same samples"):
        activation_distance(logits(0), logits(1, samples=6))
    with pytest.raises(ValueError, match="norm=l1"):
        activation_distance(logits(0), logits(1), norm="max")
    with pytest.raises(ValueError, match="temperature=1"):
        activation_distance(logits(0), logits(1), temperature=0.0)
