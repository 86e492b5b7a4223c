"""The start-up probe: find the fastest form of a linearized network that is right, on two samples.

Forward mode fails in three ways, two of them silent: an operator without a forward derivative, an operator whose
derivative cannot be differentiated again, and one that returns NaN. All show here, in a handful of passes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lqf_lightning.linear.attention import math_attention
from lqf_lightning.linear.fold_plan import FoldPlan, plan_folding
from lqf_lightning.linear.folded_network import FoldedNetwork, Tensors

Mode = Literal["jvp", "vjp"]


@dataclass(frozen=True)
class StartUp:
    """What the probe found.

    Attributes:
        plan: The folding that keeps the function.
        mode: "jvp" (forward mode, 5 units of work) or "vjp" (straight-through, 6 units).
        unreached: Parameters that have no part in the output.
        notes: Why bolder forms were turned down, one line each.
    """

    plan: FoldPlan
    mode: Mode
    unreached: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Reference:
    """Value, cotangent, gradient by plain reverse mode, and a random direction."""

    x: Tensor
    value: Tensor
    cotangent: Tensor
    gradient: dict[str, Tensor | None]
    direction: Tensors


@contextmanager
def _name_failures(model: nn.Module, label: str) -> Iterator[None]:
    # Adds the name of the innermost running module to whatever is raised.
    names = {module: name or "the network" for name, module in model.named_modules()}
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, *_: Any) -> None:
        running.pop()

    handles: list[Any] = [m.register_forward_pre_hook(enter) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        where = f"in {names[running[-1]]} ({type(running[-1]).__name__})" if running else "in the backward pass"
        raise RuntimeError(f"{label} {where}: {str(error).splitlines()[0][:300]}") from error
    finally:
        for handle in handles:
            handle.remove()


def _tolerance(tensor: Tensor) -> float:
    # Rounding alone moves a sum by about eps; kinks that flip a side move it by the root of the share that flips.
    return 3 * math.sqrt(torch.finfo(tensor.dtype).eps)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    # Relative Euclidean distance, infinite as soon as anything is not finite.
    gap = sum(float((p - q).double().square().sum()) for p, q in zip(a, b, strict=True))
    size = sum(float(q.double().square().sum()) for q in b)
    return math.sqrt(gap / max(size, 1e-300)) if math.isfinite(gap) else math.inf


def _reference(model: nn.Module, names: Sequence[str], x: Tensor) -> _Reference:
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    fixed = dict(model.named_parameters())
    leaves = {name: fixed[name].detach().clone().requires_grad_() for name in names}
    with _name_failures(model, "the network itself fails"), math_attention():
        value = functional_call(model, leaves, (x,))
    if not isinstance(value, Tensor):
        raise TypeError(
            f"cannot linearize: the network returns {type(value).__name__}, expected one tensor of logits. Wrap it in "
            "a module that picks one"
        )
    if not bool(value.isfinite().all()):
        raise ValueError("cannot linearize: the network's output at w0 is not finite on the example")
    cotangent = draw(value)
    gradients = torch.autograd.grad(value, list(leaves.values()), cotangent, allow_unused=True)
    direction = {n: 0.02 * draw(p) * max(float(p.detach().square().mean().sqrt()), 1e-2) for n, p in leaves.items()}
    return _Reference(x, value.detach(), cotangent, dict(zip(names, gradients, strict=True)), direction)


def check_head(model: nn.Module, gradient: dict[str, Tensor | None]) -> None:
    """Refuse a network whose zero head hides its body from the linearization.

    With a zero final matrix `W0`, `J d = dW phi(x)`: nothing but the head has a gradient, at any `d`, and linear
    fine-tuning degenerates to a linear probe without a message.

    Args:
        model: The network at `w0`.
        gradient: `J^T u` for a random `u` by parameter name; None where the output does not depend on it.

    Raises:
        ValueError: If only an all-zero layer has a gradient although other parameters are to be trained.
    """
    alive = [name for name, g in gradient.items() if g is not None and bool(g.count_nonzero())]
    asleep = [name for name, g in gradient.items() if g is not None and name not in alive]
    owners = {name.rpartition(".")[0] for name in alive}
    if not asleep or len(owners) > 1:
        return
    if not owners:
        raise ValueError("cannot linearize: the output has a zero gradient in every chosen parameter")
    owner = owners.pop()
    weight = getattr(model.get_submodule(owner), "weight", None)
    if isinstance(weight, Tensor) and not bool(weight.count_nonzero()):
        raise ValueError(
            f"cannot linearize: the weight of {owner!r} is all zero, so the gradient of the other {len(asleep)} chosen "
            "parameters is exactly zero and linear fine-tuning would degenerate to a linear probe. Initialize the head "
            f"randomly, or train {owner!r} alone"
        )


def _check_value(network: FoldedNetwork, reference: _Reference) -> str | None:
    with torch.no_grad():
        gap = _distance([network.value(reference.x)], [reference.value])
    bound = _tolerance(reference.value)
    return None if gap <= bound else f"its output differs by {gap:.1e} relative, expected at most {bound:.1e}"


def _check_mode(network: FoldedNetwork, mode: Mode, reference: _Reference) -> str | None:
    names = [name for name, gradient in reference.gradient.items() if gradient is not None]
    deltas = {name: reference.direction[name].clone().requires_grad_() for name in reference.direction}
    if mode == "jvp":
        value, derivative = network.pushforward(deltas, reference.x)
        output = value + derivative
    else:
        output = network.straight_through(deltas, reference.x)
        derivative = output.detach() - reference.value
    gradients = torch.autograd.grad(output, [deltas[n] for n in names], reference.cotangent, allow_unused=True)
    gradient = [torch.zeros_like(deltas[n]) if g is None else g for n, g in zip(names, gradients, strict=True)]
    expected = [g for g in reference.gradient.values() if g is not None]
    if not all(bool(g.isfinite().all()) for g in (derivative, *gradient)):
        return "its derivative is not finite"
    across = float((reference.cotangent * derivative.detach()).double().sum())
    back = sum(float((g * deltas[n].detach()).double().sum()) for n, g in zip(names, gradient, strict=True))
    scale = float(reference.cotangent.double().norm() * derivative.detach().double().norm())
    if mode == "vjp":  # the difference of two outputs carries the rounding of the outputs
        scale += float(reference.cotangent.double().norm() * reference.value.double().norm())
    bound = _tolerance(reference.value)
    if abs(across - back) > bound * max(scale, 1e-300):
        return f"<u, J d> = {across:.6g} but <J^T u, d> = {back:.6g}"
    typical = math.sqrt(sum(float(g.double().square().sum()) for g in expected) / len(expected))
    loose = max(0.1, bound)  # kinks that rounding flips weigh more in one tensor than in all
    for name, got, want in zip(names, gradient, expected, strict=True):
        gap, size = float((got - want).double().norm()), float(want.double().norm())
        if gap > loose * (size + typical):
            return f"its gradient in {name} differs from plain reverse mode by {gap:.1e}, of {size:.1e}"
    return None


def start_up(
    model: nn.Module, names: Sequence[str], x: Tensor, modes: Sequence[Mode], refold: bool
) -> tuple[StartUp, FoldedNetwork]:
    """Choose folding and differentiation mode by trying them on a few samples.

    Args:
        model: Frozen network in evaluation mode.
        names: Parameters that get a tangent.
        x: A few samples (B, ...), two are enough.
        modes: Modes to try, the preferred one first.
        refold: Whether to try folding at all.

    Returns:
        The choice, and the network folded accordingly.

    Raises:
        RuntimeError: If no form passes.
    """
    reference = _reference(model, names, x)
    check_head(model, reference.gradient)
    unreached = tuple(name for name, gradient in reference.gradient.items() if gradient is None)
    with math_attention():
        plans = plan_folding(model, x).milder() if refold else [FoldPlan()]
    notes: list[str] = []
    for mode in modes:
        for plan in plans:
            network = FoldedNetwork(model, plan)
            reason = _try(network, mode, reference)
            if reason is None:
                return StartUp(plan, mode, unreached, tuple(notes)), network
            notes.append(reason)
    raise RuntimeError("cannot linearize this network:\n  " + "\n  ".join(notes))


def _try(network: FoldedNetwork, mode: Mode, reference: _Reference) -> str | None:
    label = f"mode {mode}, {_describe(network.plan)}"
    try:
        with _name_failures(network.structure, label):
            reason = _check_value(network, reference) or _check_mode(network, mode, reference)
    except RuntimeError as error:
        return str(error)
    return None if reason is None else f"{label}: {reason}"


def _describe(plan: FoldPlan) -> str:
    if plan == FoldPlan():
        return "as it is"
    return f"{len(plan.pairs)} pairs folded, {len(plan.affine)} affine, {len(plan.in_place)} in place"
