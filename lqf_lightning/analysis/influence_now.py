"""What samples hold in place at the weights that a run has reached: approximate, and not leave-one-out."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lqf_lightning.analysis.run_problem import problem_of_run
from lqf_lightning.linear.local_influence import local_influence
from lqf_lightning.methods import Method

DAMPING = 0.1  # ridge of the curvature, as a share of the mean squared norm of a Jacobian row


def influence_now(
    method: Method, *, combinations: int | None = None, memory_gib: float = 4.0, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Linearize a fine-tuned network where it is now and let each sample's weight vanish to first order.

    By the trace kernel at the present weights, with the Gauss-Newton matrix of a squared loss, damped by a tenth of the
    mean squared norm of its rows. These weights have seen every label, so a label that the network has learned by heart
    no longer stands out: this ranks what training still pulls at, and is no substitute for leave-one-out.

    Args:
        method: The method, attached to a trainer; all ranks have to call this together.
        combinations: Random combinations of outputs that stand for all; None: all outputs.
        memory_gib: Memory for what the kernel is assembled from, in GiB.
        chunk_size: Images per pass of this rank; None: those of an evaluation batch.

    Returns:
        Manifest index (n,), ascending, and the rise of each sample's own loss if its weight vanished, to first order
        (n,), in units of the loss: nats for cross-entropy.
    """
    run = problem_of_run(
        method,
        form="trace",
        combinations=combinations,
        memory_gib=memory_gib,
        chunk_size=chunk_size,
        validation=False,
        settle=False,
    ).penalized(DAMPING)
    outputs, options = run.table.initial.double(), method.hparams
    wanted = one_hot(run.table.label, run.problem.outputs).to(outputs)
    if options["loss"] == "squared":
        gradient = outputs - float(options["target_scale"]) * wanted
    else:
        gradient = torch.softmax(outputs, 1) - wanted
    return run.table.index, local_influence(run.factor(), gradient).self_influence
