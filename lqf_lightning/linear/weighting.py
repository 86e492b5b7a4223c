"""How a loss on held-out samples moves with the weight of every training sample, exactly."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.held_out import held_out_cross_entropy
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.leave_one_out import held_out_residual
from lqf_lightning.linear.problem import QuadraticProblem

HeldOutLoss = Literal["squared", "cross_entropy"]
_FAINT = 1e-4  # of the largest weight: below, columns of the inverse divided by the root of the weight lose digits


@dataclass(frozen=True)
class WeightDerivative:
    """A loss and its derivative with respect to the sample weights.

    Attributes:
        loss: Mean over the held-out samples: half the squared distance to the target, or nats of cross-entropy.
        gradient: Derivative for every training sample (n,): where it is negative, more weight lowers the loss.
        temperature: What predictions are divided by in the cross-entropy; None for the squared loss.
    """

    loss: float
    gradient: Tensor
    temperature: float | None


def validation_derivative(
    factor: DualFactor, cross: Kernel, initial: Tensor, target: Tensor, loss: HeldOutLoss = "squared"
) -> WeightDerivative:
    r"""Derivative of the loss on other samples with respect to every sample weight (DIVA, arXiv 2111.09785).

    With the Hessian H of the objective and :math:`R_{xj} = J_x H^{-1} J_j^T` (intercept included), the outputs at x
    move by :math:`R_{xj} (y_j - f_j)` per unit of weight of sample j, so that

    .. math:: \frac{dL}{da_j} = \sum_v g_v^T R_{vj} (y_j - f_j), \qquad g_v = \partial L / \partial f_v.

    One solve with a single right-hand side gives all n of them, and a weight of 0 is no exception: there the derivative
    says what a sample that is not in the training set would bring.

    Args:
        factor: The solved problem.
        cross: Kernel with the rows of the other samples and the columns of the training samples.
        initial: Outputs on the other samples before training (m, C).
        target: Their targets (m, C), largest at the right class.
        loss: "squared", or "cross_entropy" of predictions divided by the temperature that suits them best, which moves
            along without changing the derivative, because it is the best. Where all predictions are right, it drives
            loss and derivative to 0.

    Returns:
        Loss and derivative, of the mean over the other samples.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(1, 1), torch.tensor([[4.0]]), ridge=1.0)  # f = 4 a / (a + 1)
        >>> one = Kernel({"all": torch.ones(1, 1, 1)}, outputs=1)
        >>> other = validation_derivative(DualFactor(problem, one), one, torch.zeros(1, 1), torch.tensor([[3.0]]))
        >>> round(other.loss, 9), round(float(other.gradient), 9)  # (f - 3)^2 / 2, and (f - 3) 4 / (a + 1)^2
        (0.5, -1.0)
    """
    _refuse_linear(factor.problem)
    predictions = factor.predict(cross, initial)
    value, slope, temperature = _loss(predictions, target, loss, torch.ones(len(target)).to(predictions))
    kernel, matrix = factor.system.kernel, factor.system.cross_matrix(cross)
    sides = kernel.split(slope)
    response = _response(factor, matrix.mT @ sides, _totals(sides, kernel.coupled))
    return WeightDerivative(value, (response * _residual(factor)).sum(1), temperature)


def leave_one_out_derivative(
    factor: DualFactor, judge: Tensor | None = None, loss: HeldOutLoss = "squared"
) -> WeightDerivative:
    r"""Derivative of the leave-one-out loss with respect to every sample weight: no validation set is needed.

    With R as in `validation_derivative`, residuals :math:`\rho_j = y_j - f_j`, leave-one-out residuals
    :math:`e_i = (I - a_i R_{ii})^{-1} \rho_i` and the slope :math:`g_i` of the loss at the leave-one-out prediction,

    .. math:: \frac{dL}{da_j} = \sum_{i \ne j} u_i^T R_{ij} (\rho_j + a_i R_{ji} e_i),
        \qquad u_i = (I - a_i R_{ii})^{-1} g_i.

    A sample's own weight does not move its own leave-one-out prediction. Nothing is divided by a weight, unlike in
    equation 13 of DIVA (arXiv 2111.09785), so weights may be 0.

    Args:
        factor: The solved problem.
        judge: How much the loss on each sample counts in the mean (n,), not negative; None means alike. Samples of
            weight 0 are predicted as they are, by a model that has not seen them.
        loss: "squared", or "cross_entropy", see `validation_derivative`.

    Returns:
        Loss and derivative, of the mean over the samples.

    Raises:
        ValueError: `judge` has another shape, is negative or nothing.
    """
    problem, kernel, inverse = factor.problem, factor.system.kernel, factor.inverse
    _refuse_linear(problem)
    judge = torch.ones(problem.samples).to(inverse) if judge is None else judge.to(inverse)
    if judge.shape != (problem.samples,) or bool((judge < 0).any()) or not bool(judge.any()):
        raise ValueError(f"`judge` must be ({problem.samples},), not negative and not all 0, got {tuple(judge.shape)}")
    samples, coupled = problem.samples, kernel.coupled
    blocks = inverse.reshape(-1, samples, coupled, samples, coupled).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
    held_out = held_out_residual(problem, factor.solution(), blocks)
    value, slope, temperature = _loss(problem.target.double() - held_out, problem.target, loss, judge)
    driving = torch.linalg.solve(problem.ridge * blocks, slope.reshape(*blocks.shape[:3], -1)).reshape(slope.shape)
    reach = _reach(factor)
    gradient = ((kernel.join(reach.mT @ kernel.split(driving))) * _residual(factor)).sum(1)
    return WeightDerivative(value, gradient + _through_others(factor, reach, driving, held_out), temperature)


def _loss(predictions: Tensor, target: Tensor, name: HeldOutLoss, judge: Tensor) -> tuple[float, Tensor, float | None]:
    # Mean loss, its slope in every prediction, and the temperature.
    share = (judge / judge.sum()).unsqueeze(1)
    if name == "squared":
        error = predictions - target.double()
        return float((share * 0.5 * error.square()).sum()), share * error, None
    if name != "cross_entropy":
        raise ValueError(f"`loss` must be squared or cross_entropy, got {name!r}. Set loss=squared")
    value, temperature = held_out_cross_entropy(predictions, target, judge)
    right = torch.nn.functional.one_hot(target.argmax(1), target.shape[1])
    slope = (torch.softmax(predictions / temperature, 1) - right) / temperature
    return float(value), share * slope, float(temperature)


def _residual(factor: DualFactor) -> Tensor:
    return factor.problem.target.double() - factor.solution().outputs


def _totals(sides: Tensor, coupled: int) -> Tensor:
    return sides.reshape(len(sides), -1, coupled, sides.shape[2]).sum(1)


def _response(factor: DualFactor, pull: Tensor, totals: Tensor) -> Tensor:
    # R^T g (n, C) from K_x^T g and the sums of g. Where a sample has weight, the rows of the dual system say the same
    # as the difference below, without cancellation.
    system, ridge = factor.system, factor.problem.ridge
    inner, intercept = factor.solve(system.root * pull, totals)
    rest = pull - system.matrix @ (system.root * inner) - intercept.repeat(1, factor.problem.samples, 1)
    strong = _strong(system.root)
    return system.kernel.join(torch.where(strong, inner / torch.where(strong, system.root, 1.0), rest / ridge))


def _strong(root: Tensor) -> Tensor:
    return root.square() > _FAINT * root.square().max()


def _reach(factor: DualFactor) -> Tensor:
    # R among the training samples (b, N, N).
    system, ridge = factor.system, factor.problem.ridge
    strong = _strong(system.root)
    scale = torch.where(strong, 1.0 / torch.where(strong, system.root, 1.0), 0.0)
    reach = factor.inverse.mul(-ridge)
    reach.diagonal(dim1=-2, dim2=-1).add_(1.0)
    reach.mul_(scale).mul_(scale.T)
    weak = (~strong).flatten().nonzero().flatten()
    if len(weak):
        unit = torch.eye(system.kernel.coupled).to(reach).repeat(1, factor.problem.samples)[:, weak]
        sides = system.root * system.matrix[:, :, weak]
        inner, intercept = factor.solve(sides, unit.expand(len(reach), -1, -1))
        columns = system.matrix[:, :, weak] - system.matrix @ (system.root * inner)
        columns = (columns - intercept.repeat(1, factor.problem.samples, 1)) / ridge
        reach[:, :, weak] = columns
        reach[:, weak] = columns.mT
    return reach


def _through_others(factor: DualFactor, reach: Tensor, driving: Tensor, held_out: Tensor) -> Tensor:
    # sum over i of a_i (R_ji u_i) . (R_ji e_i), and the term of i = j that is too much in it and in R^T u.
    problem, kernel = factor.problem, factor.system.kernel
    samples, coupled = problem.samples, kernel.coupled
    weight = problem.root_weight[:, 0].square().to(reach)
    left, right = (kernel.split(rows).reshape(len(reach), samples, coupled, -1) for rows in (driving, held_out))
    if coupled == 1:
        products = (left * right).sum((2, 3))
        own = reach.diagonal(dim1=-2, dim2=-1)
        moved = (reach.square() @ (weight * products).unsqueeze(2)).squeeze(2) - own * products
        return moved.sum(0)
    by_sample = reach.reshape(samples * coupled, samples, coupled)
    pushed, moved = (torch.einsum("ric,ic->ri", by_sample, part[0, :, :, 0]) for part in (left, right))
    own = reach.reshape(samples, coupled, samples, coupled).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return ((pushed * moved) @ weight).reshape(samples, coupled).sum(1) - (left[0].mT @ own @ right[0]).flatten()


def _refuse_linear(problem: QuadraticProblem) -> None:
    if problem.linear is not None and bool(problem.linear.any()):
        raise ValueError(
            "derivatives with respect to sample weights are those of a problem without linear terms; got a problem "
            "that has some. Fit them first (`problem.with_(linear=None)`)"
        )
