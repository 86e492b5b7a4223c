"""How well the linear probe does on images that it was not fitted to, from the head's part of a kernel."""

import torch
from torch import Tensor

from lqf_lightning.linear import Kernel, KernelSpectrum, QuadraticProblem, held_out_accuracy
from lqf_lightning.linear.held_out_sets import HeldOutSets
from lqf_lightning.linear.regularization_path import default_ridges

_ALIKE = 1e-3  # of a head's blocks by output, relative to their size: more than single precision explains


def probe_accuracy(
    problem: QuadraticProblem,
    kernel: Kernel,
    head: str,
    *,
    judged: Tensor | None = None,
    together: Tensor | None = None,
) -> float:
    r"""Exact leave-one-out accuracy of the linear probe, the best over ridges.

    The last layer has the Jacobian :math:`\phi(x)^T \otimes I_C`, so its group of the kernel is
    :math:`\Phi \Phi^T \otimes I_C` in the full form and :math:`\Phi \Phi^T` in all others: the probe is exact where
    LQF is represented by a surrogate. Without the samples of a set S the residuals on it are
    :math:`A_S^{-1/2} G_{SS}^{-1} \gamma_S`, with :math:`G = U (\kappa + \lambda)^{-1} U^T` and
    :math:`\gamma = G A^{1/2} (y - f_0)` of `KernelSpectrum`; an intercept is fitted anew.

    Args:
        problem: What LQF minimizes, its targets largest at the right class; its ridge plays no part.
        kernel: Inner products among its samples, the head's in a group of their own.
        head: That group, of the last layer alone.
        judged: Samples whose held-out predictions count (n,), bool; the others are fitted to. None means all.
        together: Number by sample (n,), int64: samples with the same number are left out at once. None: each alone.

    Returns:
        The share of the judged that are predicted right, by weight, not counting those of a class that leaves nothing
        to learn from when they are left out; at the best of 16 ridges, so a little flattered.

    Raises:
        ValueError: The head has no group of its own, there are linear terms, or nothing can be judged.

    Example:
        >>> import torch
        >>> features = torch.tensor([[2.0], [1.0], [-1.0], [-2.0]])
        >>> problem = QuadraticProblem(torch.zeros(4, 2), torch.eye(2)[[0, 0, 1, 1]], ridge=1.0)
        >>> probe_accuracy(problem, Kernel({"head": (features @ features.T)[None]}, 2, "trace"), "head")
        1.0
    """
    if problem.linear is not None:
        raise ValueError("the problem has linear terms, which no label explains: expected one of labels alone")
    own = Kernel({head: _shared(kernel, head)}, problem.outputs, "last_layer")
    counted = _counted(problem, judged, together)
    spectrum, sets = KernelSpectrum(problem, own), HeldOutSets.of(problem, own, together)
    held = torch.stack([_predictions(spectrum, sets, float(ridge)) for ridge in default_ridges(spectrum)])
    weight = None if problem.weight is None else problem.weight[counted]
    return float(held_out_accuracy(held[:, counted], problem.target[counted], weight).max())


def _predictions(spectrum: KernelSpectrum, sets: HeldOutSets, ridge: float) -> Tensor:
    # Of every sample by the probe that has seen none of its set (n, C).
    problem, root = spectrum.system.problem, spectrum.system.root
    inverse = 1 / (spectrum.values[0] + ridge)
    dual = spectrum.dual(lambda values: 1 / (values + ridge))[0]
    driving = torch.empty_like(dual)
    for rows in sets.rows:
        vectors = spectrum.vectors[0][rows]
        driving[rows] = torch.linalg.solve((vectors * inverse) @ vectors.mT, dual[rows])
    return problem.target.double() - driving / torch.where(root > 0, root, 1.0)


def _counted(problem: QuadraticProblem, judged: Tensor | None, together: Tensor | None) -> Tensor:
    # Judged samples of positive weight whose class has a sample in another set, which is left to learn from.
    device, samples = problem.initial.device, problem.samples
    counted = torch.ones(samples, dtype=torch.bool) if judged is None else judged
    if counted.shape != (samples,) or counted.dtype != torch.bool:
        raise ValueError(f"`judged` must be ({samples},) of bool, got {tuple(counted.shape)} of {counted.dtype}")
    label, present = problem.target.argmax(1), problem.root_weight[:, 0] > 0
    which = torch.arange(samples, device=device) if together is None else together.to(device)
    pairs = torch.unique(torch.stack([label, which])[:, present], dim=1)
    accompanied: Tensor = (pairs[0].bincount(minlength=problem.outputs) > 1)[label]
    counted = counted.to(device) & present & accompanied
    if not bool(counted.any()):
        raise ValueError(
            "no sample can be judged: each is the only one of its class, or its label is known to the starting "
            "weights. Set method.metric=identity with a method.ridge of your own, or data.shots=null for more samples"
        )
    return counted


def _shared(kernel: Kernel, head: str) -> Tensor:
    # One matrix (1, n, n) of the features before the last layer.
    if head not in kernel.groups:
        raise ValueError(
            f"the kernel has no group {head!r} but {', '.join(map(repr, kernel.groups))}: the linear probe needs the "
            "head's apart from the others. Set method.layers=null, which linearizes it"
        )
    group, outputs = kernel.groups[head], kernel.outputs
    if kernel.form != "full":
        return group[:1]
    shared = group[:, ::outputs, ::outputs]
    if outputs > 1:
        second = group[:, 1::outputs]
        odd = torch.maximum(second[..., ::outputs].abs().max(), (second[..., 1::outputs] - shared).abs().max())
        if bool(odd > _ALIKE * shared.abs().max()):
            raise ValueError(
                f"the group {head!r} holds more than a last layer, whose outputs share nothing but features"
            )
    return shared
