"""Expand the network anew around the optimum: Gauss-Newton steps, of which the last one is exactly analyzable."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lqf_lightning.linear import current_reducer
from lqf_lightning.methods.solvers.training_table import training_batches

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_STEPS = (1.0, 0.5, 0.25, 0.125)


def arrive(method: "LQF", restart: Callable[[], None]) -> None:
    """At the optimum: go on around it if the method's `relinearize` asks for it, else stop the run.

    Args:
        method: The method, attached to a trainer, dw at the optimum.
        restart: Starts the solver on the new problem.
    """
    if method.expansions >= method.relinearize or _is_last_epoch(method):
        method.trainer.should_stop = True
        return
    method.expansions += 1
    step = move_start(method)
    log.info("expansion %d of %d, after %.3g of the way to the optimum", method.expansions, method.relinearize, step)
    if step == 0:
        log.warning("no part of that way improves the network itself: nothing changes. Set method.relinearize=0")
    restart()


def _is_last_epoch(method: "LQF") -> bool:
    # An expansion that no epoch is left to solve would end with dw = 0.
    trainer = method.trainer
    epochs, steps = trainer.max_epochs, trainer.max_steps
    last = (epochs is not None and 0 <= epochs <= trainer.current_epoch + 1) or 0 <= steps <= trainer.global_step
    if last:
        log.warning(
            "the run ends after %d of %d expansions, at this optimum. Set trainer.max_epochs higher, or "
            "method.relinearize=%d", method.expansions, method.relinearize, method.expansions,
        )  # fmt: skip
    return last


def move_start(method: "LQF", steps: Sequence[float] = _STEPS) -> float:
    r"""Let the pre-trained weights take a part of the movement, :math:`w_0 \leftarrow w_0 + t\,dw`, and zero dw.

    The network at :math:`w_0 + t\,dw` is another function than its expansion, so the step t is the one at which the
    network itself fits the training samples best.

    Args:
        method: The method, attached to a trainer.
        steps: Values of t to try, descending; one forward pass each.

    Returns:
        The step, the same on every rank; 0 if none of them beats the weights as they were.
    """
    deltas = {name: delta.detach().clone() for name, delta in method.linearized.deltas.items()}
    weights = dict(method.linearized.model.named_parameters(remove_duplicate=False))
    before = {name: weights[name].detach().clone() for name in deltas}
    losses = {}
    with torch.no_grad():
        for step in (0.0, *steps):
            for name, start in before.items():
                weights[name].copy_(start + step * deltas[name])
            losses[step] = _loss(method)
        best = min(losses, key=lambda step: losses[step])
        for name, start in before.items():
            weights[name].copy_(start + best * deltas[name])
        for delta in method.linearized.deltas.values():
            delta.zero_()
    log.info("loss of the network itself by step: %s", {step: round(loss, 4) for step, loss in losses.items()})
    return best


def _loss(method: "LQF") -> float:
    total = torch.zeros(2, dtype=torch.float64, device=method.device)
    for batch in training_batches(method, "network at the new weights"):
        if number := len(batch.target):
            loss = method.loss(method.linearized.model(batch.input), batch.target)
            total += torch.tensor([float(loss) * number, number], dtype=torch.float64, device=method.device)
    current_reducer().sum_(total)
    return float(total[0] / total[1]) if torch.isfinite(total[0]) else float("inf")
