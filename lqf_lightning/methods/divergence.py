"""Training that leads nowhere."""

import torch
from torch import Tensor
from torch.optim import Optimizer


def refuse_divergence(loss: Tensor, epoch: int, optimizer: Optimizer) -> None:
    """Stop where the training loss is no longer a number.

    Args:
        loss: That of an epoch, the same on all ranks.
        epoch: Which.
        optimizer: Knows the learning rate.

    Raises:
        FloatingPointError: The loss is infinite or NaN.
    """
    if not torch.isfinite(loss):
        first = optimizer.param_groups[0]
        raise FloatingPointError(
            f"the training loss of epoch {epoch} is {loss.item()}: training diverged. Lower the "
            f"learning rate (method.optimizer.lr, now {first.get('initial_lr', first['lr']):.3g}) "
            "or check the images for non-finite values. Checkpoints of earlier epochs are kept."
        )
