import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from lqf_lightning.methods.losses import choose_loss, scaled_squared_loss

LOGITS = torch.tensor([[3.0, -1.0, 0.5], [0.0, 2.0, -4.0]], dtype=torch.float64)
TARGET = torch.tensor([2, 1])


def test_squared_loss_by_hand():
    # distances: (3, -1, 0.5 - 4) and (0, 2 - 4, -4)
    expected = 0.5 * ((9 + 1 + 12.25) + (0 + 4 + 16)) / 2
    assert scaled_squared_loss(LOGITS, TARGET, scale=4.0).item() == pytest.approx(expected, rel=1e-15)


def test_mean_squared_error_of_torch_is_two_over_c_times_ours():
    ours = scaled_squared_loss(LOGITS, TARGET, scale=7.0)
    theirs = nn.MSELoss()(LOGITS, 7.0 * one_hot(TARGET, 3).double())
    assert theirs.item() == pytest.approx(2 / 3 * ours.item(), rel=1e-15)


def test_gradient_is_the_mean_residual():
    logits = LOGITS.clone().requires_grad_()
    scaled_squared_loss(logits, TARGET, scale=15.0).backward()
    assert torch.allclose(logits.grad, (LOGITS - 15 * one_hot(TARGET, 3)) / 2, rtol=1e-15)


def test_options_choose_the_loss():
    assert choose_loss("squared", 3.0)(LOGITS, TARGET) == scaled_squared_loss(LOGITS, TARGET, 3.0)
    by_hand = -(LOGITS[0, 2] - LOGITS[0].exp().sum().log() + LOGITS[1, 1] - LOGITS[1].exp().sum().log()) / 2
    assert choose_loss("cross_entropy", 3.0)(LOGITS, TARGET).item() == pytest.approx(by_hand.item(), rel=1e-14)


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("hinge", 1.0, r"'hinge'.*method\.loss=squared"),
        ("squared", 0.0, r"got 0\.0.*method\.target_scale=15"),
        ("squared", float("nan"), r"got nan.*method\.target_scale=15"),
    ],
)
def test_wrong_options_name_the_override(name, scale, message):
    with pytest.raises(ValueError, match=message):
        choose_loss(name, scale)
