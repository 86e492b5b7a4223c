"""The penalty that leave-one-out prefers: the ridge, and a factor for every stage or block."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lqf_lightning.linear import (
    Kernel,
    QuadraticProblem,
    current_reducer,
    mean_of_ridge,
    restrict_kernel,
    restrict_problem,
)
from lqf_lightning.linear.learned_penalty import LearnedPenalty, expected_penalty, learn_penalty
from lqf_lightning.methods.leaking_start import judged_samples
from lqf_lightning.methods.solvers.acceleration import LEARNED_ROWS
from lqf_lightning.methods.solvers.auto_ridge import penalized_groups, settle_ridge, surrogate_kernel
from lqf_lightning.methods.solvers.narrow_tensors import NARROW, set_narrow_apart, with_narrow
from lqf_lightning.methods.solvers.outlook import outlook
from lqf_lightning.methods.solvers.training_table import TrainingTable
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_FINE_STEPS = 12  # on the exact kernel, from what its trace has given
_HEAD = 0.5  # part of the kernel that the head is expected to have: head and body alike
_TRUSTED = 0.9  # the same where nothing can be learned: with one image per class the features had better stay
_LEAST = 0.03  # of the kernel's mean diagonal: with smaller ridges and no sketch, iterations are too many
_WORSE = 0.05  # nats per sample that a penalty may lose on images that it was not learned on


def settle_penalty(
    method: "LQF", table: TrainingTable, kernel: Kernel | None = None, scales: Mapping[str, float] | None = None
) -> Kernel | None:
    """Give a method without a ridge its ridge, and with ``metric=learned`` the factors that go with it.

    The penalty is learned by the cross-entropy of leave-one-out predictions on the training samples. No label of the
    validation or test set has a part in it, nor the prediction of a sample whose label the starting weights have seen.
    On the exact kernel the result is that of the model itself; on a trace kernel, of a surrogate with one weight vector
    per output. With a reference to match, labels alone decide about the factors, and then what is matched about the
    ridge.

    Args:
        method: The method, attached to a trainer.
        table: Its training samples.
        kernel: A kernel of them, if one is at hand, by penalty group if factors are to be learned; else a surrogate is
            assembled.
        scales: What its groups are multiplied with, where factors are given.

    Returns:
        The surrogate that was assembled for all samples, its groups apart; None if there is none.
    """
    if not math.isnan(method.ridge):
        return None
    if method.metric != "learned" or table.reference is not None:
        _refuse_copies(method, reference=table.reference is not None)
    if method.metric != "learned":
        settle_ridge(method, table, kernel, scales)
        return None
    assembled, chosen = None, None
    if kernel is None or kernel.form != "full" or kernel.groups.keys() != penalized_groups(method).keys():
        if table.initial.numel() > LEARNED_ROWS:  # fewer rows are left to a preconditioner that knows the model itself
            set_narrow_apart(method, table.initial.numel())
        chosen = _by_lot(method, table)
        kernel = surrogate_kernel(method, table, chosen)
        assembled = kernel if chosen is None else None
    rows = torch.arange(len(table.index)) if chosen is None else chosen
    rows = rows.to(table.index.device)
    found = _learn(method, table, kernel, rows)
    if NARROW in method.penalty_groups:
        found = method.learned_penalty = with_narrow(found)
    # A part was chosen without augmented copies, which weigh as much as the image itself: together they are one.
    copies = 1 if chosen is None else _copies(method)
    _take(method, found, kernel, len(table.label) // copies)
    if table.reference is not None:
        part = replace(
            table, index=table.index[rows], label=table.label[rows], initial=table.initial[rows],
            reference=table.reference[rows],
        )  # fmt: skip
        method.ridge = math.nan
        settle_ridge(method, part, kernel, {group: found.scales[group] for group in kernel.groups})
        method.ridge *= len(part.label) / len(table.label)  # that of the sum form stays
    return assembled


def _copies(method: "LQF") -> int:
    return int(getattr(method.solver.data_module(), "copies", 1))


def _refuse_copies(method: "LQF", *, reference: bool) -> None:
    if _copies(method) > 1 and reference:
        raise ValueError(
            "ridge=auto with a reference leaves out single samples, of which data.copies keeps copies in: it would "
            "choose too small a ridge. Set data.copies=1, or method.ridge=1e-3 with method.metric=identity"
        )
    if _copies(method) > 1:
        raise ValueError(
            "ridge=auto with metric=identity leaves out single samples, of which data.copies keeps copies in: it would "
            "choose too small a ridge. Set method.metric=learned, which leaves out all copies, or method.ridge=1e-3"
        )


def _by_lot(method: "LQF", table: TrainingTable) -> Tensor | None:
    samples, most = len(table.index), method.penalty_samples
    if samples <= most:
        return None
    data = cast(Any, method.solver.data_module())
    images = torch.arange(samples)
    if _copies(method) > 1:  # the images themselves, without their augmented copies
        images = images[data.image_of(table.index.cpu()) == table.index.cpu()]
    chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most]].sort().values
    log.info(
        "the penalty is learned on %d of %d training samples, by lot: method.penalty_samples", len(chosen), samples
    )
    return chosen


def _learn(method: "LQF", table: TrainingTable, kernel: Kernel, rows: Tensor) -> LearnedPenalty:
    data = cast(Any, method.solver.data_module())
    index = table.index[rows]
    problem = restrict_problem(table.labels(method, ridge=1.0), rows)
    judged = judged_samples(data, index)
    together = data.together(index) if hasattr(data, "together") else None  # of data modules that know copies of images
    options: dict[str, Any] = {"judged": judged, "together": together, "expected": _expected(kernel)}
    options["least_ridge"] = 0.0 if kernel.form == "full" or table.initial.numel() <= LEARNED_ROWS else _LEAST
    if not _can_judge(method, table.label[rows], index if together is None else together):
        method.learned_penalty = unlearned = expected_penalty(problem, kernel, _expected(kernel, _TRUSTED))
        method.penalty_form = kernel.form
        return unlearned
    if len(rows) < len(table.index):
        _check_transfer(problem, kernel, options)
    start = learn_penalty(problem, _trace_of(kernel), **options, watch=lambda steps: track(steps, "penalty"))
    found = start
    if kernel.form == "full":
        options |= {"start": start, "steps": _FINE_STEPS}
        found = learn_penalty(problem, kernel, **options, watch=lambda steps: track(steps, "penalty, exactly"))
    if math.isinf(found.temperature):
        log.warning("no penalty that was tried predicts left-out images better than guessing: expect nothing of LQF")
    method.learned_penalty, method.penalty_form = found, kernel.form
    accuracy = float(found.accuracy[found.step])
    if "head" in kernel.groups:
        images = len(table.label) // getattr(data, "copies", 1)  # augmented copies are no further images
        shots = images / len(method.classes)
        method.outlook = outlook(
            problem, kernel, "head", accuracy, judged=judged, together=together, samples_per_class=shots,
            share=found.share,
        )  # fmt: skip
    return found


def _take(method: "LQF", found: LearnedPenalty, kernel: Kernel, samples: int) -> None:
    # The ridge of the sum form stays when samples are added; rounding differs between devices, so the first decides.
    names = list(penalized_groups(method))
    factors = [1.0 / found.scales[name] for name in names]
    values = [mean_of_ridge(found.ridge, samples), found.relative_ridge, *factors]
    settled = current_reducer().broadcast_(torch.tensor(values, dtype=torch.float64, device=method.device)).tolist()
    method.ridge, method.relative_ridge = settled[:2]
    method.group_ridge = dict(zip(names, settled[2:], strict=True))
    kind = "the exact kernel" if kernel.form == "full" else "the trace kernel, a surrogate"
    accuracy = float(found.accuracy[found.step])
    how = (
        "could not be learned" if math.isnan(accuracy) else f"learned by {kind}: leave-one-out accuracy {accuracy:.3f}"
    )
    largest = sorted(found.share, key=lambda name: -found.share[name])[:3]
    log.info(
        "penalty %s, ridge=%.4g, most weight on %s",
        how, method.ridge, ", ".join(f"{n} ({found.share[n]:.0%})" for n in largest),
    )  # fmt: skip
    if method.outlook is not None:
        log.info("%s", method.outlook.words)


def _trace_of(kernel: Kernel) -> Kernel:
    # The mean over outputs of the kernels of single outputs, from which the learning starts: a thousandth of the work.
    if kernel.form != "full":
        return kernel
    outputs = kernel.outputs
    groups = {
        name: matrix[0].reshape(len(matrix[0]) // outputs, outputs, -1, outputs).diagonal(dim1=1, dim2=3).mean(-1)[None]
        for name, matrix in kernel.groups.items()
    }
    return replace(kernel, groups=groups, form="trace")


def _expected(kernel: Kernel, head: float = _HEAD) -> dict[str, float] | None:
    # As in the network's own metric, roughly: half for the head, half for all that is below it.
    others = [name for name in kernel.groups if name != "head"]
    if len(others) == len(kernel.groups) or not others:
        return None
    return {"head": head} | dict.fromkeys(others, (1 - head) / len(others))


def _check_transfer(problem: QuadraticProblem, kernel: Kernel, options: dict[str, Any]) -> None:
    # Learned on one half, is the penalty as good on the other half as what is learned there?
    order = torch.randperm(problem.samples, generator=torch.Generator().manual_seed(1)).to(problem.initial.device)
    first, second = (part.sort().values for part in order.tensor_split(2))
    halves = [_half(problem, kernel, options, rows) for rows in (first, second)]
    try:
        learned = learn_penalty(*halves[0][:2], **halves[0][2])
        here = learn_penalty(*halves[1][:2], **halves[1][2])
        moved = learn_penalty(*halves[1][:2], **halves[1][2], start=learned, steps=1)
    except ValueError as error:  # too few images per class in a half; the whole may well do
        log.warning("whether the penalty transfers to other images cannot be checked on halves of these: %s", error)
        return
    lost = float(moved.loss[moved.step] - here.loss[here.step])  # one evaluation, of the start
    tell = log.warning if lost > _WORSE else log.info
    tell(
        "a penalty learned on half of these images loses %.3f nats per image on the other half, accuracy %.3f against "
        "%.3f%s", lost, float(moved.accuracy[moved.step]), float(here.accuracy[here.step]),
        ": it does not transfer, set method.penalty_samples higher" if lost > _WORSE else "",
    )  # fmt: skip


def _half(
    problem: QuadraticProblem, kernel: Kernel, options: dict[str, Any], rows: Tensor
) -> tuple[QuadraticProblem, Kernel, dict[str, Any]]:
    own = {name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()}
    return restrict_problem(problem, rows), restrict_kernel(kernel, rows=rows, columns=rows), own


def _can_judge(method: "LQF", label: Tensor, image: Tensor) -> bool:
    # Copies of one image are left out together, so that they do not speak for one another.
    first = torch.unique(torch.stack([label, image.to(label)]), dim=1)[0]
    counts = torch.bincount(first, minlength=len(method.classes))
    if int(counts.max()) < 2:
        log.warning(
            "no class has two training images, so that leave-one-out cannot choose a penalty: the head gets nine "
            "tenths of the weight, and the ridge is a tenth of the kernel's diagonal"
        )
        return False
    if int(counts.min()) < 2:
        log.warning("%d of %d classes have fewer than two training images, which leave-one-out cannot predict: they "
                    "have no say in the penalty", int((counts < 2).sum()), len(counts))  # fmt: skip
    return True
