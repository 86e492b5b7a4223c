"""The optimum on the training samples that are there, from the kernel that they have kept."""

import logging
import math
from collections.abc import Mapping

import torch

from lqf_lightning.analysis.counted_passes import CountedPasses
from lqf_lightning.analysis.intercept_certificate import mean_jacobian_of_kernel
from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.analysis.stopping_rule import StoppingRule
from lqf_lightning.linear import ConjugateGradient, DualPrecondition, assemble_kernel, current_reducer
from lqf_lightning.methods import LQF
from lqf_lightning.methods.solvers.auto_ridge import kernel_scales, merged_groups
from lqf_lightning.methods.solvers.training_images import TrainingImages
from lqf_lightning.progress import track

log = logging.getLogger(__name__)
LIMIT = 20_000  # rows of a kernel


class KernelScrub:
    r"""Factors the rows and columns of the samples that are there, and pulls the coefficients back to the weights.

    The weights before play no part. The kernel is rounded, so outputs are computed anew from the weights as they are
    stored, and what is left of the dual system is solved again, as long as that helps:
    :math:`\gamma \leftarrow \gamma - \tilde S^{-1} (A^{1/2} (f - y) + \lambda \gamma)`.

    Args:
        passes: The samples that are there.
        kept: Their kernel.
        rule: When to stop.
        most: Most solutions.

    Attributes:
        curve: Work, relative gradient and distance by then, for every solution.
        steps: Solutions computed.
        mean_jacobian: Norm of the mean Jacobian, see `mean_jacobian_of_kernel`.

    Raises:
        ValueError: The kernel is too large, or does not belong to the samples.
    """

    def __init__(self, passes: CountedPasses, kept: KeptKernel, rule: StoppingRule, most: int = 4) -> None:
        rows = passes.problem.samples * passes.problem.outputs
        if rows > LIMIT:
            raise ValueError(f"a kernel of {rows} rows is too large, at most {LIMIT} can be solved. Set solver=newton")
        self.passes, self.rule, self.most = passes, rule, most
        kept = kept.only(passes.table.index.cpu()).to(passes.method.device)
        self.inverse = DualPrecondition(passes.problem, kept.kernel, scales_of(passes.method, kept.groups))
        self.mean_jacobian = mean_jacobian_of_kernel(passes.problem, self.inverse.factor.system.matrix[0])
        self.curve: list[dict[str, float]] = []
        self.steps = 0

    def run(self) -> ConjugateGradient:
        """Solve.

        Returns:
            The best point, its gradient measured from scratch.
        """
        passes, problem, deltas = self.passes, self.passes.problem, self.passes.method.linearized.deltas
        point = best = passes.start()
        coefficients, gap, root = torch.zeros_like(problem.residual), math.inf, problem.root_weight
        reference = math.nan if self.rule.tolerance is None else None
        while self.steps < self.most:
            misfit = root * (point.outputs - problem.target.double()) + problem.ridge * coefficients
            coefficients = coefficients - self.inverse(misfit)
            sides = [root * coefficients] + ([point.residual] if reference is None else [])
            pulled, *at_zero = passes.pull(*sides, description="weights")
            reference = passes.length(at_zero[0]) if at_zero else reference
            movement = {name: entry.to(deltas[name]) for name, entry in passes.metric.solve(pulled).items()}
            point = passes.measure(movement, passes.push(movement), reference=reference)
            self.steps, before, now = self.steps + 1, gap, self.rule.gap(point.certificate)
            self._note(point)
            if now < before:
                best, gap = point, now
            if now <= 1 or now > before / 2:  # near enough, or as near as rounding allows
                break
        return best

    def _note(self, point: ConjugateGradient) -> None:
        found = point.certificate
        row = {"passes": self.passes.count, "distance_bound": found.distance_bound}
        known = {} if self.rule.tolerance is None else {"relative_gradient": found.relative_gradient}
        self.curve.append(row | known)


def scales_of(method: LQF, groups: Mapping[str, object]) -> dict[str, float]:
    """What the kernels of layer groups are multiplied with, whether each has its own or those of one ridge share one.

    Args:
        method: The method.
        groups: Anything by the names of the kernels.

    Returns:
        Scale by name.

    Raises:
        ValueError: The names are neither.
    """
    for scales in (kernel_scales(method), merged_groups(method)[1]):
        if set(scales) == set(groups):
            return scales
    raise ValueError(
        f"the kept kernel has the parts {sorted(groups)}, the method penalizes {sorted(kernel_scales(method))} or "
        f"{sorted(merged_groups(method)[1])}: an assembly was interrupted, or it is another's. Set solver=newton"
    )


def kernel_of_present_samples(passes: CountedPasses, memory_gib: float) -> KeptKernel:
    """Assemble the kernel of the samples that are there: one evaluation and one backward pass per output.

    Args:
        passes: The samples; products of layers are not counted as work.
        memory_gib: Memory for what the kernel is assembled from, in GiB.

    Returns:
        The kernel.
    """
    method = passes.method
    pair = assemble_kernel(
        method.linearized,
        merged_groups(method)[0],
        TrainingImages(method),
        index=passes.table.own_index,
        other_index=passes.table.own_index[:0],
        budget=int(memory_gib * 2**30),
        limit=LIMIT,
        reducer=current_reducer(),
        watch=lambda items: track(items, "kernel"),
    )
    passes.units += 1 + passes.problem.outputs
    return KeptKernel(pair.train.groups, pair.train.outputs, pair.index.cpu())
