"""What every strength of matching would give on held-out samples, from kernels that are assembled once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.congruence.flip_report import flip_rates
from lqf_lightning.congruence.matching_problem import MatchingProblem
from lqf_lightning.linear import DualFactor, Kernel, KernelSpectrum, Solution
from lqf_lightning.linear.dual_system import WORST_CONDITION, DualSystem

Strength = tuple[float, float]
_WORTH = 16  # factorizations that one eigendecomposition takes as long as
_GIB = 2**30


@dataclass(frozen=True)
class HeldOutSamples:
    """Samples that flips are counted on, as far as the reference knows their classes: others can neither flip nor stay.

    Attributes:
        initial: Outputs before training (m, C).
        label: Class positions (m,).
        old_right: Whether the reference is right (m,), boolean.
        known: Whether it knows the class (m,), boolean.

    Raises:
        ValueError: The shapes do not fit, or the reference knows the class of no sample.
    """

    initial: Tensor
    label: Tensor
    old_right: Tensor
    known: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(values.shape) for values in (self.label, self.old_right, self.known)]
        if self.initial.dim() != 2 or shapes != 3 * [(len(self.initial),)]:
            raise ValueError(f"expected outputs (m, C) and three values per sample, got {self.initial.shape}, {shapes}")
        if not bool(self.known.any()):
            raise ValueError(
                "the reference knows the class of no validation sample, so that no flip can be counted. Set "
                "method.tradeoff=null, or reference to a model of these classes"
            )


@dataclass(frozen=True)
class TradeoffCurve:
    """Error against negative flips; entry p of every tensor belongs to the p-th strength. On the CPU.

    Attributes:
        alpha: Weight of matching for every sample (P,).
        beta: What is added where the reference is right (P,).
        counts: Held-out samples of known classes by [reference right?, new model right?] (P, 2, 2), whole numbers.
        new_right: Whether the new model is right on each of them (P, k), to compare points on the same samples.
        old_right: The same of the reference (k,).
        objective: Minimum of the sum-form objective, labels, matching and penalty (P,).
        relative_gradient: Certificate of the point, for the kernel as it was assembled (P,).
    """

    alpha: Tensor
    beta: Tensor
    counts: Tensor
    new_right: Tensor
    old_right: Tensor
    objective: Tensor
    relative_gradient: Tensor

    @property
    def rates(self) -> dict[str, Tensor]:
        """The rates of `FlipReport` by name (P,): error_new, nfr, pfr, relative_nfr and others."""
        return flip_rates(self.counts)

    @property
    def reference_error(self) -> float:
        """Error rate of the reference on the held-out samples."""
        return float((~self.old_right).double().mean())


def strengths(alpha: Iterable[float], beta: Iterable[float]) -> list[Strength]:
    """All pairs of a grid, each once.

    Args:
        alpha: Values of alpha.
        beta: Values of beta.

    Returns:
        Pairs (alpha, beta), ascending.

    Example:
        >>> strengths([0, 1], [5, 0, 5])
        [(0.0, 0.0), (0.0, 5.0), (1.0, 0.0), (1.0, 5.0)]
    """
    betas = [float(value) for value in beta]
    return sorted({(float(value), other) for value in alpha for other in betas})


def tradeoff_curve(
    problem: MatchingProblem,
    kernel: Kernel,
    cross: Kernel,
    held_out: HeldOutSamples,
    points: Sequence[Strength],
    *,
    scales: Mapping[str, float] | None = None,
    watch: Callable[[Sequence[Strength]], Iterable[Strength]] = iter,
    worth: int = _WORTH,
    budget: int = 12 * _GIB,
) -> TradeoffCurve:
    r"""Solve for every strength of matching, and count flips.

    Nothing is assembled anew. Where all samples have the same weight a, which they have for beta = 0 if the reference
    knows all classes, the system :math:`a K + \lambda I` has the eigenvectors of K, so that one decomposition serves
    all such points: each is a fit of other targets at the ridge :math:`\lambda / a`. Other weights do not commute with
    K, and take a factorization each. As a decomposition costs about as much as `worth` of these, fewer uniform points
    are factored too.

    Args:
        problem: Labels and reference.
        kernel: Inner products among the training samples.
        cross: Kernel with the rows of the held-out samples and the columns of the training samples.
        held_out: The held-out samples.
        points: Pairs (alpha, beta), at least 0.
        scales: Inverse penalty weights by layer group, see `Kernel.total`.
        watch: Wraps the points, to report progress.
        worth: Number of points with uniform weights from which the kernel is decomposed.
        budget: Bytes that matrices may take.

    Returns:
        The curve, in the order of the points.

    Raises:
        ValueError: There is no point, a strength is negative, or the ridge is too small for double precision.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear import QuadraticProblem
        >>> labels = QuadraticProblem(torch.zeros(2, 2), torch.tensor([[4.0, 0.0], [0.0, 4.0]]), ridge=1.0)
        >>> wrong_on_second = torch.tensor([[4.0, 0.0], [3.0, 1.0]])
        >>> right = torch.tensor([True, False])
        >>> problem = MatchingProblem(labels, wrong_on_second, right, torch.tensor([0, 1]))
        >>> kernel = Kernel({"all": 9 * torch.eye(4)[None]}, outputs=2)
        >>> held_out = HeldOutSamples(torch.zeros(2, 2), torch.tensor([0, 1]), right, known=right | True)
        >>> curve = tradeoff_curve(problem, kernel, kernel, held_out, [(0.0, 0.0), (9.0, 0.0)])
        >>> curve.rates["error_new"].tolist(), curve.rates["pfr"].tolist()
        ([0.0, 0.5], [0.5, 0.0])
    """
    if not points or min(min(point) for point in points) < 0:
        raise ValueError(
            f"expected pairs (alpha, beta) of numbers that are not negative, got {list(points)}. Set "
            "method.tradeoff={alpha: [0, 1], beta: [0, 5]}"
        )
    uniform = [point for point in points if _is_uniform(problem, point)]
    spectrum = KernelSpectrum(problem.labels, kernel, scales, budget=budget) if len(uniform) >= worth else None
    right, objective, gradient = [], [], []
    for point in watch(points):
        if spectrum is not None and point in uniform:
            system, solution = _from_spectrum(problem, point, spectrum, budget)
        else:
            factor = DualFactor(problem.at(*point), kernel, scales, budget=budget)
            system, solution = factor.system, factor.solution()
        outputs = system.predict(solution, cross, held_out.initial)
        right.append((outputs.argmax(1) == held_out.label)[held_out.known])
        objective.append(solution.certificate.objective + float(problem.targets(*point).constant.sum()))
        gradient.append(solution.certificate.relative_gradient)
    new_right, old_right = torch.stack(right).cpu(), held_out.old_right[held_out.known].cpu()
    return TradeoffCurve(
        alpha=torch.tensor([alpha for alpha, _ in points], dtype=torch.float64),
        beta=torch.tensor([beta for _, beta in points], dtype=torch.float64),
        counts=_count(old_right, new_right),
        new_right=new_right,
        old_right=old_right,
        objective=torch.tensor(objective, dtype=torch.float64),
        relative_gradient=torch.tensor(gradient, dtype=torch.float64),
    )


def _is_uniform(problem: MatchingProblem, point: Strength) -> bool:
    weight = problem.targets(*point).weight
    return bool((weight == weight[0]).all())


def _from_spectrum(
    problem: MatchingProblem, point: Strength, spectrum: KernelSpectrum, budget: int
) -> tuple[DualSystem, Solution]:
    own, kernel = problem.at(*point), spectrum.system.kernel
    ridge = own.ridge / float(own.root_weight[0].square())
    top = float(spectrum.values.max())
    if top > WORST_CONDITION * ridge:
        raise ValueError(
            f"the ridge {own.ridge:.3g} (sum form) is too small beside the kernel's largest eigenvalue {top:.3g} for "
            f"alpha={point[0]:g}, beta={point[1]:g}. Set method.ridge higher, or leave this point out"
        )
    rotated = spectrum.vectors.mT @ kernel.split(own.residual)
    coefficients = kernel.join(spectrum.vectors @ (rotated / (spectrum.values + ridge).unsqueeze(2)))
    system = DualSystem(own, kernel, spectrum.system.scales, copies=1, budget=budget)
    return system, system.certify(coefficients)


def _count(old_right: Tensor, new_right: Tensor) -> Tensor:
    cells = 2 * old_right.long() + new_right.long()
    return torch.stack([torch.bincount(row, minlength=4) for row in cells]).view(-1, 2, 2)
