"""Advice before training: what leave-one-out says about the linear probe, LQF, and methods that are not linear."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lqf_lightning.linear import Kernel, QuadraticProblem
from lqf_lightning.methods.solvers.probe_accuracy import probe_accuracy

Verdict = Literal["linear", "either", "nonlinear"]

FEW = 10.0  # training images per class up to which linear methods mostly win
LITTLE = 0.1  # held-out error of LQF that leaves little to win
MUCH = 0.3  # held-out error of LQF that leaves much to win
MOST = 0.5  # held-out error of LQF that calls for a comparison, whatever else is known
GAIN = 0.1  # part of the probe's held-out errors that LQF mends where features have to move
EARLY = 0.25  # share of early layers in the learned penalty with which half of that gain is enough

_BODY_END = 2 / 3
_TITLES = {
    "linear": "linear fine-tuning is likely to do as well as any",
    "either": "linear and nonlinear fine-tuning may both win",
    "nonlinear": "nonlinear fine-tuning is likely to win",
}
_COMMANDS = {
    "linear": "method=finetune is unlikely to do better",
    "either": "compare with method=finetune",
    "nonlinear": "try method=finetune, or LQF around weights that took nonlinear steps on core data, with "
    "backbone.weights=CORE/checkpoints/last.ckpt",
}


@dataclass(frozen=True)
class Outlook:
    """What is to be expected of a training set, before LQF is trained on it.

    Attributes:
        probe: Leave-one-out accuracy of the linear probe, at the best ridge of its own.
        linear: Leave-one-out accuracy of LQF at the penalty that it was given.
        exact: Whether `linear` is that of the model itself (the full kernel), or of a surrogate; `probe` always is.
        verdict: Who is likely to win, see `judge`.
        words: The same in one or two sentences, with what it is based on and what to type.
    """

    probe: float
    linear: float
    exact: bool
    verdict: Verdict
    words: str


def outlook(
    problem: QuadraticProblem,
    kernel: Kernel,
    head: str,
    linear: float,
    *,
    exact: bool | None = None,
    judged: Tensor | None = None,
    together: Tensor | None = None,
    samples_per_class: float | None = None,
    share: Mapping[str, float] | None = None,
) -> Outlook:
    """Compare LQF with the linear probe by leave-one-out, and say when a nonlinear method is likely to win.

    Args:
        problem: What LQF learns from labels; its ridge plays no part.
        kernel: Inner products among its samples, the head's in a group of their own.
        head: That group, of the last layer alone.
        linear: Leave-one-out accuracy of LQF.
        exact: Whether that is the model's own; None: if the kernel is the full one.
        judged: Samples whose held-out predictions count (n,), bool, as in `linear`; None means all.
        together: Number by sample (n,), int64: samples with the same number are left out at once, as in `linear`.
        samples_per_class: Training images per class, where the problem is of some of them only; None: those of the
            problem.
        share: Part that each group has of the kernel's diagonal after its penalty was learned, in forward order; None
            leaves that sign out.

    Returns:
        Figures, verdict and words.

    Raises:
        ValueError: The accuracy is none; or `probe_accuracy` refuses.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> features = torch.randn(60, 8, generator=draw, dtype=torch.float64)
        >>> label = features[:, :2].argmax(1)
        >>> problem = QuadraticProblem(torch.zeros(60, 2), torch.eye(2)[label], ridge=1.0, intercept=True)
        >>> kernel = Kernel({"head": (features @ features.T)[None]}, outputs=2, form="trace")
        >>> found = outlook(problem, kernel, "head", linear=0.97)
        >>> round(found.probe, 4), found.verdict
        (0.9333, 'linear')
    """
    if not 0 <= linear <= 1:
        raise ValueError(f"the leave-one-out accuracy of LQF must be between 0 and 1, got {linear}")
    probe = probe_accuracy(problem, kernel, head, judged=judged, together=together)
    images = problem.samples / problem.outputs if samples_per_class is None else samples_per_class
    early = math.nan if share is None else early_share(share, head)
    own = kernel.form == "full" if exact is None else exact
    verdict, reason = judge(probe, linear, images, early)
    kind = "exact" if own else "a surrogate's"
    words = (
        f"By leave-one-out (linear probe {probe:.3f}, LQF {linear:.3f}, {kind}), {_TITLES[verdict]}: {reason}. "
        f"This is a rule of thumb from five image sets, for test images like the training images; {_COMMANDS[verdict]}."
    )
    return Outlook(probe, linear, own, verdict, words)


def early_share(share: Mapping[str, float], head: str) -> float:
    """The part of the kernel's diagonal from the stem to two thirds of the body's depth, counted in groups.

    Args:
        share: Part of every group, in forward order.
        head: The group that is not of the body.

    Returns:
        Between 0 and 1, of the whole diagonal; NaN if the head is the only group.

    Example:
        >>> early_share({"stem": 0.1, "stage1": 0.4, "stage2": 0.3, "head": 0.2}, "head")
        0.5
    """
    body = [name for name in share if name != head]
    early = body[: math.floor(_BODY_END * len(body) + 1e-9)]
    return sum(share[name] for name in early) / sum(share.values()) if body else math.nan


def judge(probe: float, linear: float, images: float, early: float = math.nan) -> tuple[Verdict, str]:
    """The rule of thumb, from leave-one-out figures that cost no training.

    Features *have to move* if LQF mends `GAIN` of the probe's errors, or half of that with `EARLY` of the kernel's
    diagonal below the last third of the body, whose features are those of the pre-training task.

    1. "linear" with up to `FEW` images per class, or if LQF errs on no more than `LITTLE`;
    2. "nonlinear" if features have to move and LQF errs on `MUCH` or more;
    3. "either" if they have to move, or LQF errs on `MOST`; else "linear".

    It rests on five image sets, which is little (EfficientNet-Lite0, 18 to 64 images per class of 64 pixels, trace
    kernel), on who won when LQF and fine-tuning were tested, partly at other sizes, and on what is known of few shots:

    | | probe | LQF | gain | early | who won, on test images |
    |---|---|---|---|---|---|
    | textures | .748 | .753 | .02 | .07 | linear, .81 against .74 |
    | CIFAR-10 | .616 | .636 | .05 | .02 | linear, .71 against .68 |
    | digits | .922 | .950 | .36 | .76 | neither, .97 |
    | cars | .232 | .251 | .02 | .12 | nonlinear, .50 against .44 |
    | traffic signs | .528 | .570 | .09 | .36 | nonlinear by far, .86 against .41 |

    It says "either" about cars. Leave-one-out cannot see test images that differ from the training images, and takes
    frames of one scene for a proof of skill; with a hundred samples its gain is known to about .1 only.

    Args:
        probe: Leave-one-out accuracy of the linear probe.
        linear: Leave-one-out accuracy of LQF.
        images: Training images per class.
        early: See `early_share`; NaN: not known.

    Returns:
        The verdict, and why in a few words.

    Example:
        >>> judge(probe=0.37, linear=0.44, images=20)
        ('nonlinear', 'much is still wrong, and features have to move')
        >>> judge(probe=0.80, linear=0.81, images=72)
        ('linear', 'the features need hardly move')
    """
    error = 1 - linear
    if images <= FEW:
        return "linear", f"there are only {images:.3g} images per class"
    if error <= LITTLE:
        return "linear", "little is left to win"
    gain = (GAIN / 2 if early >= EARLY else GAIN) * (1 - probe)
    moves = linear > probe and linear - probe >= gain
    if moves and error >= MUCH:
        return "nonlinear", "much is still wrong, and features have to move"
    if moves:
        return "either", "features have to move, but not much is still wrong"
    if error >= MOST:
        return "either", "most is still wrong, though features need hardly move"
    return "linear", "the probe does as well" if linear <= probe else "the features need hardly move"
