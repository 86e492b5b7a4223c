"""A network replaced by its first-order expansion around its weights."""

from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lqf_lightning.linear.attention import forget_attention_biases
from lqf_lightning.linear.delta_tree import DeltaTree
from lqf_lightning.linear.folded_network import FoldedNetwork
from lqf_lightning.linear.full_precision import full_precision
from lqf_lightning.linear.linearizable import check_linearizable, resolve_parameters
from lqf_lightning.linear.start_up import Mode, StartUp, start_up


class LinearizedModel(nn.Module):
    """The linear model `f(x) = f0(x) + J(x) dw` of a network around its weights `w0` (LQF, arXiv 2012.11140, eq. 1).

    `dw` are ordinary parameters, zero at the start, so that optimizers, DistributedDataParallel and checkpoints work
    unchanged; the network itself is taken over: frozen, and in evaluation mode for good, also after `train()`.
    The derivative is taken in forward mode inside `forward` (5 units of work per step, where ordinary fine-tuning
    takes 3), on a copy with its batch normalizations folded; `dw` stays in the coordinates of the original.
    Wrap this module, never the network: DistributedDataParallel and torch.compile go outside.

    Args:
        model: Classifier (B, 3, H, W) -> (B, C), or any module from one tensor to one tensor.
        parameters: Names from `model.named_parameters()` that get a `dw`; None takes all. Work shrinks with the choice.
        example: A few inputs for the start-up probe (two are enough). Without it the first two samples that
            arrive are used.
        mode: "jvp" (forward mode), "vjp" (straight-through, 6 units, any operator), or "auto": the first that is
            right on the example.
        refold: Whether to compute on a copy with folded batch normalization, if that keeps the function.

    Attributes:
        model: The network at `w0`.
        dw: Tree of the movements under the original names.
        mode: The mode in use; "auto" until the probe has run.
        notes: Why bolder forms were turned down by the probe, one line each.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> x = torch.randn(2, 2)
        >>> linear = LinearizedModel(net, example=x)
        >>> bool((linear(x) == net(x)).all())
        True
        >>> sorted(linear.deltas)
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[str] | None = None,
        *,
        example: Tensor | None = None,
        mode: Literal["auto", "jvp", "vjp"] = "auto",
        refold: bool = True,
    ) -> None:
        super().__init__()
        if mode not in ("auto", "jvp", "vjp"):
            raise ValueError(f"mode is {mode!r}, expected 'auto', 'jvp' or 'vjp'")
        check_linearizable(model)
        self.names = resolve_parameters(model, parameters)
        self.model = model.requires_grad_(False).eval()
        forget_attention_biases(model)
        self.dw = DeltaTree()
        original = dict(model.named_parameters(remove_duplicate=False))
        for name in self.names:
            self.dw.place(name, original[name])
        self.mode: Literal["auto", "jvp", "vjp"] = mode
        self.refold = refold
        self.notes: tuple[str, ...] = ()
        self._slots = list(self.dw.slots(self.names))
        self._frozen = [(module, key) for module in model.modules() for key in module._parameters]
        self._found: StartUp | None = None
        self._network: FoldedNetwork | None = None
        # Other changes are noticed in forward, but compiled code does not look for them.
        self.register_load_state_dict_post_hook(_forget_network)  # type: ignore[no-untyped-call]
        if example is not None:
            self._start(example)

    @property
    def deltas(self) -> dict[str, nn.Parameter]:
        """The movements by original name, in the order of `model.named_parameters()`."""
        found = {}
        for name, module, key in self._slots:
            parameter = module._parameters[key]
            if parameter is not None:
                found[name] = parameter
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the linear model.

        Args:
            x: Input (B, 3, H, W), or whatever the network takes.

        Returns:
            `f0(x) + J(x) dw` (B, C), in float32 if the network computed in a shorter type.
        """
        network = self._current(x)
        deltas: dict[str, Tensor] = dict(self.deltas)
        if self.mode == "vjp" and torch.is_grad_enabled():
            output = _widen(network.straight_through(deltas, x))
        else:
            value, derivative = network.pushforward(deltas, x)
            output = _widen(value) + _widen(derivative)
        if self._found is not None and self._found.unreached and torch.is_grad_enabled():
            # Parameters without a part in the output get a zero gradient, which DistributedDataParallel waits for.
            output = output + 0.0 * sum(deltas[name].sum() for name in self._found.unreached)
        return output

    def folded(self, x: Tensor) -> FoldedNetwork:
        """The network at `w0` in the form that is cheapest to differentiate, up to date with `model`.

        Args:
            x: An input (B, 3, H, W); the start-up probe takes two samples of it, if it has not run yet.

        Returns:
            The folded copy, shared with this model; not to be changed.
        """
        return self._current(x)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the module; the network stays in evaluation mode.

        Args:
            mode: True for training.

        Returns:
            The module itself.
        """
        super().train(mode)
        self.model.eval()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._network = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _current(self, x: Tensor) -> FoldedNetwork:
        if torch.compiler.is_compiling() and self._network is not None:
            return self._network
        thawed = [key for module, key in self._frozen if _requires_grad(module, key)]
        if thawed:
            raise RuntimeError(
                f"{len(thawed)} parameters of the linearized network require a gradient (first: {thawed[0]!r}); w0 "
                "stays frozen, or a step would cost twice as much and train nothing. Undo requires_grad_ on `model` "
                "and train `dw`"
            )
        if self._found is None:
            self._start(x)
        if self._network is None and self._found is not None:
            self._network = FoldedNetwork(self.model, self._found.plan)
        if self._network is None:
            raise RuntimeError("the linearized network could not be built")
        if not self._network.is_current():
            self._network.refresh(self.model)
        return self._network

    @full_precision()
    def _start(self, x: Tensor) -> None:
        modes: tuple[Mode, ...] = ("jvp", "vjp") if self.mode == "auto" else (self.mode,)
        device = next(self.model.parameters()).device
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            dtype = next(self.model.parameters()).dtype
            sample = x[:2].detach().clone().to(device=device, dtype=dtype if x.is_floating_point() else None)
            self._found, self._network = start_up(self.model, self.names, sample, modes, self.refold)
        self.mode, self.notes = self._found.mode, self._found.notes


def _requires_grad(module: nn.Module, key: str) -> bool:
    parameter = module._parameters[key]
    return parameter is not None and parameter.requires_grad


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _forget_network(module: nn.Module, _: Any) -> None:
    if isinstance(module, LinearizedModel):
        module._network = None
