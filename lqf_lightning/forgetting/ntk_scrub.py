"""How far a linearized training would have moved without some samples: the step of the NTK scrub."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.restrict import restrict_kernel, restrict_problem


@dataclass(frozen=True)
class NTKMovement:
    r"""Two optima of the linearized problem in terms of its samples, weights being :math:`M^{-1} J^T \beta`.

    Attributes:
        coefficients: :math:`\beta(D_r) - \beta(D)` (n, C): what pulls the weights to where they would be without the
            forgotten samples.
        retained: :math:`\beta(D_r)` (n, C), zero on the forgotten samples.
        intercept: :math:`b(D_r) - b(D)` (C,), zeros if the problem has none.
    """

    coefficients: Tensor
    retained: Tensor
    intercept: Tensor


def ntk_movement(
    problem: QuadraticProblem,
    kernel: Kernel,
    forgotten: Tensor,
    *,
    retained_ridge: float,
    scales: Mapping[str, float] | None = None,
) -> NTKMovement:
    r"""Solve the linearized problem with and without some samples.

    Forgetting Outside the Box (Golatkar et al., ECCV 2020) moves trained weights by :math:`\Delta = w_{lin}(D_r) -
    w_{lin}(D)`. With one ridge :math:`\lambda` for both and :math:`\Theta = J J^T + \lambda I` in blocks of retained
    (r) and forgotten (f) samples, residuals :math:`e = y - f_0` and no intercept, that is

    .. math:: \Delta = -P J_f^T M V,\quad P = I - J_r^T \Theta_{rr}^{-1} J_r,\quad
        M = (\Theta_{ff} - \Theta_{fr} \Theta_{rr}^{-1} \Theta_{rf})^{-1},\quad
        V = e_f - \Theta_{fr} \Theta_{rr}^{-1} e_r,

    with a minus in V. A penalty beside a *mean* loss, as trainings have, has another ridge in the sum form once there
    are fewer samples, hence the two ridges.

    Args:
        problem: That of all samples; its ridge is that of the optimum with all of them.
        kernel: Full kernel of the training samples.
        forgotten: Positions in the problem (f,), int64, each once.
        retained_ridge: lambda of the optimum without them, in sum form: `ridge_of_mean(mu, n - f)`.
        scales: Inverse penalty weights by layer group, see `Kernel.total`.

    Returns:
        The movement, in double precision.

    Raises:
        ValueError: Positions are unknown or repeated, there is none, or no sample remains; or the refusals of
            `DualFactor`.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[4.0], [16.0]]), ridge=1.0)
        >>> kernel = Kernel({"all": torch.diag(torch.tensor([3.0, 15.0]))[None]}, outputs=1)
        >>> ntk_movement(problem, kernel, torch.tensor([1]), retained_ridge=13.0).coefficients.flatten().tolist()
        [-0.75, -1.0]
    """
    samples = problem.samples
    known = bool(((forgotten >= 0) & (forgotten < samples)).all())
    if not 0 < len(forgotten) < samples or not known or len(set(forgotten.tolist())) < len(forgotten):
        raise ValueError(
            f"expected between 1 and {samples - 1} different positions below {samples}, got {len(forgotten)}: "
            f"{forgotten.tolist()[:5]}"
        )
    every = DualFactor(problem, kernel, scales).solution()
    stays = torch.ones(samples, dtype=torch.bool, device=problem.initial.device)
    stays[forgotten.to(stays.device)] = False
    kept = stays.nonzero().flatten()
    smaller = restrict_problem(problem, kept).with_(ridge=retained_ridge)
    rest = DualFactor(smaller, restrict_kernel(kernel, rows=kept, columns=kept), scales).solution()
    if every.coefficients is None or rest.coefficients is None:
        raise ValueError("the solver gave no coefficients, which weights are pulled from")
    retained = torch.zeros_like(every.coefficients).index_copy_(0, kept, rest.coefficients)
    return NTKMovement(retained - every.coefficients, retained, rest.intercept - every.intercept)


def trapezium_scale(movement: Mapping[str, Tensor], leg: Mapping[str, Tensor]) -> float:
    r"""What a movement of the linearized training is multiplied with to be as long as that of the network itself.

    The linearized optima with and without the forgotten samples are the short base of a trapezium, the networks trained
    with and without them the ends of the long one, and the legs are what linearization misses. If it is isosceles, the
    long base measures :math:`\lVert \Delta \rVert + 2 |\cos(\Delta, q)|\, \lVert q \rVert`. This is a rule of the
    paper's code, which takes :math:`q = w - w_0 - w_{lin}(D_r)`; nothing guarantees it.

    Args:
        movement: Delta, by parameter name.
        leg: q, by the same names.

    Returns:
        The factor, at least 1; 1 where nothing moves.

    Example:
        >>> import torch
        >>> trapezium_scale({"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([-3.0, 4.0])})  # (2 + 2 * 3) / 2
        4.0
    """
    square = sum(float(own.double().square().sum()) for own in movement.values())
    inner = sum(float((own.double() * leg[name].double()).sum()) for name, own in movement.items())
    return 1.0 + 2.0 * abs(inner) / square if square > 0 else 1.0
