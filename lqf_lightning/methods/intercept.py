"""Whether a bias is the intercept of a linearized network."""

import logging

import torch

from lqf_lightning.linear import LinearizedModel, exactly

log = logging.getLogger(__name__)


def is_intercept(model: LinearizedModel, bias: str, side: int) -> bool:
    """Try whether moving a bias moves every output by as much, whatever the image.

    Args:
        model: The linearized model.
        bias: Name of a parameter; False if it is not linearized.
        side: Side of images in pixels.

    Returns:
        Whether its Jacobian is the identity: not if something other than shifts follows the last layer.
    """
    if bias not in model.deltas:
        return False
    delta = model.deltas[bias].detach()
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(delta)
    move = torch.linspace(1.0, 2.0, delta.numel()).to(delta)
    with exactly(images.device, False):
        _, moved = model.folded(images).pushforward({bias: move}, images)
    return moved.shape[1:] == move.shape and torch.allclose(moved, move.expand_as(moved), rtol=1e-5)


def tell_missing_intercept(wanted: bool, found: str | None, bias: str) -> None:
    """Warn about an intercept that is asked for and not there.

    Args:
        wanted: Whether it is asked for.
        found: Its name, None if it is not there.
        bias: Name of the parameter that should be it.
    """
    if wanted and found is None:
        log.warning("there is no intercept: %s is not linearized, or does not shift all outputs alike", bias)
