"""The ridge chosen by exact leave-one-out, without a validation set."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lqf_lightning.linear import (
    Kernel,
    KernelSpectrum,
    QuadraticProblem,
    RegularizationPath,
    assemble_kernel,
    current_reducer,
    held_out_accuracy,
    held_out_cross_entropy,
    held_out_press,
    mean_of_ridge,
    regularization_path,
)
from lqf_lightning.methods.leaking_start import judged_samples
from lqf_lightning.methods.solvers.narrow_tensors import NARROW
from lqf_lightning.methods.solvers.training_images import TrainingImages
from lqf_lightning.methods.solvers.training_table import TrainingTable
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_COMBINATIONS = 2
_LIMIT = 20_000  # rows of a kernel


def surrogate_kernel(
    method: "LQF", table: TrainingTable, chosen: Tensor | None = None, scales: Mapping[str, float] | None = None
) -> Kernel:
    """The trace kernel by random combinations of outputs: one or two backward passes, whatever the classes.

    It belongs to another model (one weight vector per output), so it may choose a penalty, rank samples and
    precondition, no more.

    Args:
        method: The method, attached to a trainer.
        table: Its training samples.
        chosen: Rows of the table to take (s,), ascending; None means all.
        scales: What groups are multiplied with and then added up, into one named "total"; None keeps them apart.

    Returns:
        The kernel.

    Raises:
        ValueError: There are too many samples.
    """
    samples = len(table.label if chosen is None else chosen)
    if samples > _LIMIT:
        raise ValueError(
            f"a surrogate kernel is for at most {_LIMIT} training samples, got {samples}. Set method.ridge to a "
            "number, for instance one that auto has chosen with data.subset_ratio, and method.acceleration=kfac"
        )
    images, own = TrainingImages(method), table.own_index
    if chosen is not None:
        loader = method.solver.data_module().chosen_dataloader(table.index[chosen].cpu())
        images = TrainingImages(method, loader)
        own = torch.cat([own[:0], *(batch.index.to(own) for batch in loader)])
    groups = {group: names for group, names in penalized_groups(method).items() if group != NARROW}
    return assemble_kernel(
        method.linearized,
        groups,
        images,
        form="trace",
        combinations=_COMBINATIONS,
        index=own,
        other_index=own[:0],
        budget=int(method.memory_gib * 2**30),
        limit=_LIMIT,
        reducer=current_reducer(),
        scales=None if scales is None else {group: scales[group] for group in groups},
        watch=lambda items: track(items, "trace kernel"),
    ).train


def penalized_groups(method: "LQF") -> dict[str, list[str]]:
    """Parameter names by penalty group, the intercept left out: what kernels are assembled for.

    Args:
        method: The method.

    Returns:
        The groups that have a penalized parameter.
    """
    penalized = method.penalty_weights()
    members = {group: [n for n in names if n in penalized] for group, names in method.penalty_groups.items()}
    return {group: names for group, names in members.items() if names}


def kernel_scales(method: "LQF") -> dict[str, float]:
    """What the kernel of each penalty group is multiplied with: one over its factor of the ridge.

    Args:
        method: The method.

    Returns:
        Scale by penalty group.
    """
    return {group: 1.0 / method.group_ridge.get(group, 1.0) for group in penalized_groups(method)}


def merged_groups(method: "LQF") -> tuple[dict[str, list[str]], dict[str, float]]:
    """Penalty groups of the same ridge as one: they need no kernels of their own, each of which takes memory.

    Args:
        method: The method.

    Returns:
        Parameter names by merged group, and what the kernel of each is multiplied with.
    """
    groups: dict[str, list[str]] = {}
    scales: dict[str, float] = {}
    for group, names in penalized_groups(method).items():
        factor = method.group_ridge.get(group, 1.0)
        groups.setdefault(f"ridge x {factor:g}", []).extend(names)
        scales[f"ridge x {factor:g}"] = 1.0 / factor
    return groups, scales


def settle_ridge(
    method: "LQF", table: TrainingTable, kernel: Kernel | None = None, scales: Mapping[str, float] | None = None
) -> None:
    """Give a method without a ridge the one of the best leave-one-out accuracy, ties broken by the squared residual.

    With a reference to match, leaving a sample out takes away its label and what the reference answers on it, and the
    prediction is judged by the label, each sample counting once: what is matched is a means, the label is the end.
    What a reference that was trained on the sample has handed on through its answers on others is not taken away.
    Samples whose labels the starting weights have seen are fitted to, and have no say.

    Args:
        method: The method, attached to a trainer.
        table: Its training samples.
        kernel: The exact kernel, if it is at hand; else a surrogate is assembled.
        scales: What its groups are multiplied with.
    """
    if not math.isnan(method.ridge):
        return
    kernel = surrogate_kernel(method, table) if kernel is None else kernel
    problem = table.problem(method, ridge=1.0)
    spectrum = KernelSpectrum(problem, kernel, scales or kernel_scales(method))
    path = regularization_path(spectrum, watch=lambda ridges: track(ridges, "leave-one-out over ridges"))
    judged = judged_samples(method.solver.data_module(), table.index)
    if table.reference is not None or judged is not None:
        labels = table.labels(method, ridge=1.0)
        path = judged_by_labels(path, problem, labels.target, judged=judged, weight=labels.weight)
    chosen = path.choose(by="accuracy")
    accuracy = math.nan if path.accuracy is None else float(path.accuracy[(path.ridges - chosen).abs().argmin()])
    ridge = torch.tensor(mean_of_ridge(chosen, len(table.label)), dtype=torch.float64, device=method.device)
    method.ridge = float(current_reducer().broadcast_(ridge))  # rounding may break ties differently elsewhere
    method.path, method.path_form = path, kernel.form
    _tell(method, table, path, accuracy)


def judged_by_labels(
    path: RegularizationPath,
    problem: QuadraticProblem,
    target: Tensor,
    *,
    judged: Tensor | None = None,
    weight: Tensor | None = None,
) -> RegularizationPath:
    """Judge leave-one-out predictions by targets and weights other than those that are fitted.

    Args:
        path: Leave-one-out of the problem that is fitted.
        problem: That problem.
        target: Targets to judge by (n, C), largest at the right class.
        judged: Samples that have a say (n,), bool; None means all.
        weight: What each counts (n,); None: samples count alike.

    Returns:
        The path with residuals, PRESS, accuracy and cross-entropy of these targets; the rest stays as it is.
    """
    predictions = problem.target.double() - path.residual
    several = problem.outputs > 1
    if judged is not None:
        weight = judged.to(problem.initial) * (1 if weight is None else weight)
    return replace(
        path,
        residual=target.double() - predictions,
        press=held_out_press(predictions, target, weight),
        accuracy=held_out_accuracy(predictions, target, weight) if several else None,
        cross_entropy=held_out_cross_entropy(predictions, target, weight)[0] if several else None,
    )


def _tell(method: "LQF", table: TrainingTable, path: RegularizationPath, accuracy: float) -> None:
    kind = "the exact kernel" if method.path_form == "full" else "the trace kernel, a surrogate"
    tie = path.accuracy is not None and bool((path.accuracy == path.accuracy[0]).all())
    how = "the squared residual, as all leave-one-out accuracies are" if tie else "leave-one-out accuracy,"
    log.info("ridge=%.4g: chosen by %s %.3f, by %s", method.ridge, how, accuracy, kind)
    ends = (float(path.ridges.min()), float(path.ridges.max()))
    if min(abs(math.log(method.ridge * len(table.label) / end)) for end in ends) < 0.01:
        log.warning("the chosen ridge is at the end of those that were compared: set method.ridge to look further")
    if int(torch.bincount(table.label, minlength=len(method.classes)).min()) < 2:
        log.warning(
            "a class has fewer than two training images, which leave-one-out cannot predict: ridge=auto is unreliable"
        )
