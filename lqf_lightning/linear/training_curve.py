"""The whole course of training, from the kernel: no network is evaluated, no weight is moved."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.output_loss import OutputLoss
from lqf_lightning.linear.training_rule import TrainingRule


@dataclass(frozen=True)
class TrainingGroup:
    r"""How the weights of one layer group are trained.

    Attributes:
        factor: Factor of the learning rate.
        decay: u: the gradient gets :math:`u\,dw` on top, or :math:`u (w_0 + dw)` where an origin is given.
        origin: :math:`J_g w_0` (n, C), what the group's own weights do to the outputs: weight decay towards zero, as
            `torch.optim.SGD` has it on the weights themselves. None: towards the pre-trained weights.
    """

    factor: float = 1.0
    decay: float = 0.0
    origin: Tensor | None = None


@dataclass(frozen=True)
class TrainingCurve:
    """Loss and error of training, step by step; penalties are not part of the loss.

    Attributes:
        loss: Mean loss of all training samples before every step, and after the last (T + 1,).
        error: Share of them whose largest output is not that of their class (T + 1,).
        batch_loss: Mean loss of the batch of every step, before the step (T,): what training itself can log.
    """

    loss: Tensor
    error: Tensor
    batch_loss: Tensor


def training_curve(
    kernel: Kernel,
    initial: Tensor,
    loss: OutputLoss,
    rule: TrainingRule,
    *,
    groups: Mapping[str, TrainingGroup] | None = None,
    batches: Iterable[Tensor] | None = None,
) -> TrainingCurve:
    r"""Train a linearized network in function space, exactly, whatever the loss and the batches.

    The outputs of group g move by :math:`m_g = J_g\,dw_g`, for which a step of `TrainingRule` reads

    .. math:: g_g = K_{g,B} \nabla_B / |B| + u_g (m_g + o_g), \quad v_g \leftarrow \mu v_g + g_g, \quad
        m_g \leftarrow m_g - h \rho_g v_g,

    with the gradient of the loss of the batch B at :math:`f = f_0 + \sum_g m_g`: the recursion
    :math:`f_{t+1} = f_t - \frac hn K \nabla(f_t)` of Zancato et al. (NeurIPS 2020) with everything that an optimizer
    adds to it. A step costs N times as many products as the batch has outputs. Training that diverges gives a curve
    that is not finite from some step on.

    Args:
        kernel: Inner products among the training samples, by layer group, free biases included. Forms other than
            "full" are curves of another model, see `Kernel`.
        initial: Outputs at the pre-trained weights f_0 (n, C).
        loss: Of the outputs.
        rule: Learning rates on the mean loss, and momentum.
        groups: Learning-rate factors and decay by layer group, all groups of the kernel; None: factor 1, no decay.
        batches: Rows of the samples of every step (B,), repetitions counting; None: all samples in every step.

    Returns:
        The curve. What is not known of layer groups is refused as in `Kernel.total`.

    Raises:
        ValueError: There are fewer batches than steps, or one is empty.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear.output_loss import SquaredOutputLoss
        >>> kernel = Kernel({"all": torch.ones(1, 1, 1)}, outputs=1)
        >>> rule = TrainingRule(torch.full((2,), 0.5))
        >>> training_curve(kernel, torch.zeros(1, 1), SquaredOutputLoss(torch.tensor([[8.0]])), rule).loss.tolist()
        [32.0, 8.0, 2.0]
    """
    outputs = initial.double().clone()
    parts = _merge(kernel, groups or dict.fromkeys(kernel.groups, TrainingGroup()), outputs)
    everyone = torch.arange(len(outputs), device=outputs.device)
    chosen = iter(batches) if batches is not None else None
    curve, seen = [_state(outputs, loss, everyone)], []
    for number, rate in enumerate(rule.rates.tolist()):
        rows = everyone if chosen is None else next(chosen, everyone[:0]).to(everyone)
        if not len(rows):
            raise ValueError(f"step {number + 1} of {rule.steps} has no batch, or an empty one")
        if len(rows) == len(outputs) and torch.equal(rows.sort().values, everyone):
            rows = everyone  # a batch of all, in whatever order, needs no columns picked
        now = outputs[rows]
        seen.append(loss.value(now, rows).mean())
        gradient = loss.gradient(now, rows) / len(rows)
        for part in parts:
            outputs += part.move(kernel, gradient, None if rows is everyone else rows, rate, rule, first=number == 0)
        curve.append(_state(outputs, loss, everyone))
    losses, errors = zip(*curve, strict=True)
    return TrainingCurve(torch.stack(losses), torch.stack(errors), torch.stack(seen))


def _state(outputs: Tensor, loss: OutputLoss, rows: Tensor) -> tuple[Tensor, Tensor]:
    wrong = outputs.argmax(1) != loss.label.to(outputs.device)
    return loss.value(outputs, rows).mean(), wrong.double().mean()


@dataclass
class _Part:
    # A layer group, or several that move alike: its matrix, and what it has done to the outputs so far.
    matrix: Tensor
    group: TrainingGroup
    moved: Tensor
    velocity: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.velocity = torch.zeros_like(self.moved)

    def move(
        self, kernel: Kernel, gradient: Tensor, rows: Tensor | None, rate: float, rule: TrainingRule, *, first: bool
    ) -> Tensor:
        pull = kernel.join(self._columns(kernel, rows) @ kernel.split(gradient))
        if self.group.decay:
            origin = 0.0 if self.group.origin is None else self.group.origin
            pull = pull + self.group.decay * (self.moved + origin)
        self.velocity = pull.clone() if first else self.velocity.mul_(rule.momentum).add_(pull)
        direction = pull + rule.momentum * self.velocity if rule.nesterov else self.velocity
        change = direction * (-rate * self.group.factor)
        self.moved += change
        return change

    def _columns(self, kernel: Kernel, rows: Tensor | None) -> Tensor:
        if rows is None:
            return self.matrix
        places = rows[:, None] * kernel.coupled + torch.arange(kernel.coupled, device=rows.device)
        return self.matrix[:, places.flatten()].mT  # symmetric, and rows lie together in memory


def _merge(kernel: Kernel, groups: Mapping[str, TrainingGroup], outputs: Tensor) -> list[_Part]:
    # Groups without decay are one group whose kernel is weighted by their rates; others are, if rate and decay agree.
    _refuse_groups(kernel, groups)
    alike: dict[tuple[float, float], dict[str, float]] = {}
    for name, group in groups.items():
        key = (group.factor if group.decay else 1.0, group.decay)
        alike.setdefault(key, {})[name] = 1.0 if group.decay else group.factor
    parts = []
    for (factor, decay), scales in alike.items():
        total = kernel.total(scales)
        origins = [o.to(outputs) for name in scales if (o := groups[name].origin) is not None]
        group = TrainingGroup(factor, decay, sum(origins[1:], origins[0]) if origins else None)
        parts.append(_Part(total.add_(total.mT.clone()).mul_(0.5).to(outputs), group, torch.zeros_like(outputs)))
    return parts


def _refuse_groups(kernel: Kernel, groups: Mapping[str, TrainingGroup]) -> None:
    if set(groups) != set(kernel.groups):
        raise ValueError(f"expected the layer groups {list(kernel.groups)}, got {list(groups)}")
    low = [name for name, group in groups.items() if group.factor < 0 or group.decay < 0]
    if low:
        raise ValueError(f"factors and weight decay must not be negative, they are for {low}")
