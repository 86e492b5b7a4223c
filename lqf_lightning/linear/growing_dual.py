"""A factored dual problem that grows: new rows of the Cholesky factor instead of a new factorization."""

from dataclasses import replace

import torch
from torch import Tensor

from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.dual_system import DualSystem
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem


class GrowingDual(DualFactor):
    r"""A `DualFactor` to which samples, and outputs that share the kernel, can be added.

    The factor of a bordered matrix is that of the old one with rows below,
    :math:`L_{21} = S_{21} L_{11}^{-T}, \; L_{22} L_{22}^T = S_{22} - L_{21} L_{21}^T`: m new rows take N^2 m operations
    where factoring anew takes N^3 / 3. The result is that of all samples at once, whatever the order and the chunks.

    Args:
        system: Problem and kernel.
        lower: Cholesky factor of the weighted kernel with its ridge (b, N, N).

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(1, 1), torch.tensor([[1.0]]), ridge=1.0)
        >>> one = Kernel({"all": torch.ones(1, 1, 1)}, outputs=1)
        >>> grown = GrowingDual.of(DualFactor(problem, one)).grow(problem.with_(target=torch.tensor([[3.0]])), one, one)
        >>> grown.solution().outputs.flatten()  # 4 / (2 + 1)
        tensor([1.3333, 1.3333], dtype=torch.float64)
    """

    def __init__(self, system: DualSystem, lower: Tensor) -> None:
        self.system, self.lower = system, lower

    @classmethod
    def of(cls, factor: DualFactor) -> "GrowingDual":
        """Start from a solved problem.

        Args:
            factor: The solved problem, which stays as it is.

        Returns:
            The same with the ability to grow.
        """
        return cls(factor.system, factor.lower)

    def grow(self, problem: QuadraticProblem, cross: Kernel, own: Kernel) -> "GrowingDual":
        """Add samples.

        Args:
            problem: The new samples, with the ridge and intercept of the old.
            cross: Kernel with the rows of the new samples and the columns of the old.
            own: Kernel among the new samples.

        Returns:
            The solved problem of all samples, the new ones last.

        Raises:
            ValueError: Ridge or intercept differ, the kernels do not fit, or the ridge is too small for double
                precision.
        """
        old, size = self.system, len(self.lower[0])
        kernel = _border(old.kernel, cross, own)
        whole = DualSystem(_append(old.problem, problem), kernel, old.scales, copies=1, budget=_ANY)
        weighted = whole.weighted()[:, size:]
        below = torch.linalg.solve_triangular(self.lower, weighted[:, :, :size].mT, upper=False).mT
        corner = weighted[:, :, size:] - below @ below.mT
        corner.diagonal(dim1=-2, dim2=-1).add_(problem.ridge)
        last, info = torch.linalg.cholesky_ex(corner)
        if bool((info > 0).any()):
            raise ValueError(
                f"the ridge {problem.ridge:.1e} is too small for double precision once the new samples are in; factor "
                "the kernel of all samples, or set method.ridge to a larger value"
            )
        above = torch.cat([self.lower, self.lower.new_zeros(len(below), size, last.shape[-1])], 2)
        return GrowingDual(whole, torch.cat([above, torch.cat([below, last], 2)], 1))

    def grow_outputs(self, initial: Tensor, target: Tensor) -> "GrowingDual":
        """Add outputs that share the kernel of the others: new classes of a linear probe.

        Args:
            initial: New outputs of all samples before training (n, k).
            target: Their targets (n, k).

        Returns:
            The solved problem of all outputs.

        Raises:
            ValueError: The outputs do not share a kernel.
        """
        kernel, problem = self.system.kernel, self.problem
        if kernel.blocks * kernel.coupled > 1:
            raise ValueError(
                f"a new class has its own rows in a {kernel.form} kernel, on the old samples too: assemble the kernel "
                "of all outputs and factor it, or use the form last_layer or trace"
            )
        extra = None if problem.linear is None else torch.zeros_like(initial, dtype=torch.float64)
        wider = problem.with_(
            initial=torch.cat([problem.initial.double(), initial.double()], 1),
            target=torch.cat([problem.target.double(), target.double()], 1),
            linear=None if extra is None else torch.cat([problem.linear_terms, extra], 1),
        )
        kernel = replace(kernel, outputs=wider.outputs)
        return GrowingDual(DualSystem(wider, kernel, self.system.scales, copies=1, budget=_ANY), self.lower)


_ANY = 2**62  # bytes: whoever holds the old factor decides about memory


def _border(old: Kernel, cross: Kernel, own: Kernel) -> Kernel:
    for kernel in (cross, own):
        if (kernel.form, kernel.outputs, set(kernel.groups)) != (old.form, old.outputs, set(old.groups)):
            raise ValueError(
                f"the kernel before is {old.form}, {old.outputs} outputs, groups {sorted(old.groups)}; got "
                f"{kernel.form}, {kernel.outputs}, {sorted(kernel.groups)}"
            )
    groups = {}
    for name, block in old.groups.items():
        wide, corner = cross.groups[name].to(block), own.groups[name].to(block)
        if wide.shape[-1] != block.shape[-1] or corner.shape[-2:] != (wide.shape[-2], wide.shape[-2]):
            raise ValueError(
                f"expected kernels of m new rows, (m, {block.shape[-1]}) and (m, m); got {tuple(wide.shape[-2:])} and "
                f"{tuple(corner.shape[-2:])} for group {name!r}"
            )
        groups[name] = torch.cat([torch.cat([block, wide.mT], 2), torch.cat([wide, corner], 2)], 1)
    return Kernel(groups, old.outputs, old.form)


def _append(old: QuadraticProblem, new: QuadraticProblem) -> QuadraticProblem:
    if (old.ridge, old.intercept) != (new.ridge, new.intercept):
        raise ValueError(
            f"the samples before have ridge {old.ridge} and intercept={old.intercept}, the new ones {new.ridge} and "
            f"{new.intercept}: keep the ridge of the sum form"
        )
    linear = [part.linear_terms for part in (old, new)]
    return old.with_(
        initial=torch.cat([old.initial.double(), new.initial.double()]),
        target=torch.cat([old.target.double(), new.target.double()]),
        weight=torch.cat([part.root_weight[:, 0].square() for part in (old, new)]),
        linear=None if old.linear is None and new.linear is None else torch.cat(linear),
    )
