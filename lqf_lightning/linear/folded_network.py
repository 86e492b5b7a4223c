"""A copy of a network that computes the same function at the cost of its convolutions, and its tangents.

The copy shares every tensor with the original except those that folding changes. Tangents come in the coordinates
of the original parameters and are mapped linearly, so that penalties, optimizers and checkpoints never see the fold.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.modules.batchnorm import _BatchNorm

from lqf_lightning.linear.attention import forget_attention_biases, math_attention
from lqf_lightning.linear.batch_norm import FrozenNorm, NormConstants
from lqf_lightning.linear.fold_plan import FoldPlan

Tensors = dict[str, Tensor]


class FoldedNetwork:
    """A folded copy of a frozen evaluation-mode network, with `f0(x)` and `J(x) d`.

    Args:
        model: The network at `w0`; neither changed nor owned.
        plan: What to fold; the empty plan gives the network itself.
    """

    def __init__(self, model: nn.Module, plan: FoldPlan) -> None:
        self.plan = plan
        self.slots = [(module, key) for module in model.modules() for key in (*module._parameters, *module._buffers)]
        self.structure = self._fold_structure(model)
        fast = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        self.has_fast_path = any(isinstance(module, fast) for module in model.modules())
        self.refresh(model)

    def _fold_structure(self, model: nn.Module) -> nn.Module:
        tensors = [*model.parameters(), *model.buffers()]
        # A deep copy that finds every tensor already copied shares them all.
        memo = {id(tensor): tensor for tensor in tensors}
        structure: nn.Module = copy.deepcopy(model, memo)
        replaced: dict[nn.Module, nn.Module] = {}
        for conv_name, norm_name in self.plan.pairs:
            conv, norm = structure.get_submodule(conv_name), structure.get_submodule(norm_name)
            if conv._parameters.get("bias") is None:
                empty = torch.zeros(0, dtype=torch.float32)
                conv.bias = nn.Parameter(empty, requires_grad=False)
            replaced[norm] = FrozenNorm(_as_norm(norm), absorbed=True)
        for norm_name in self.plan.affine:
            norm = structure.get_submodule(norm_name)
            replaced[norm] = FrozenNorm(_as_norm(norm), absorbed=False)
        for parent in list(structure.modules()):
            for key, child in parent._modules.items():
                if child in replaced:
                    parent._modules[key] = replaced[child]
        for name in self.plan.in_place:
            structure.get_submodule(name).inplace = True  # type: ignore[assignment]
        forget_attention_biases(structure)
        return structure

    def is_current(self) -> bool:
        """Tell whether the tensors of the original are still those that were folded.

        Catches in-place writes (the start of DistributedDataParallel, `copy_`) and replaced tensors alike.

        Returns:
            False if `refresh` is due.
        """
        return self.stamp == self._take_stamp()

    def _take_stamp(self) -> list[tuple[int, int]]:
        stamp = []
        for module, key in self.slots:
            tensor = module._parameters.get(key, module._buffers.get(key))
            if tensor is not None:
                stamp.append((id(tensor), tensor._version))
        return stamp

    def refresh(self, model: nn.Module) -> None:
        """Fold the present values of the original anew.

        Args:
            model: The network that this copy was made of.
        """
        self.stamp = self._take_stamp()
        with torch.inference_mode(False), torch.no_grad():
            original: Tensors = dict(model.named_parameters(remove_duplicate=False))
            original.update(model.named_buffers(remove_duplicate=False))
            original = {name: tensor.detach() for name, tensor in original.items()}
            self.original = original
            self.state = dict(original)
            self.constants: dict[str, NormConstants] = {}
            for conv, norm in self.plan.pairs:
                self._fold_pair(model, conv, norm)
            for norm in self.plan.affine:
                self._fold_affine(model, norm)
            for norm in (*self.plan.affine, *(norm for _, norm in self.plan.pairs)):
                for key in ("running_mean", "running_var", "num_batches_tracked"):
                    self.state.pop(f"{norm}.{key}", None)

    def _fold_pair(self, model: nn.Module, conv: str, norm: str) -> None:
        weight = self.original[f"{conv}.weight"]
        constants = NormConstants(_as_norm(model.get_submodule(norm)), self.original.get(f"{conv}.bias"))
        scale = constants.scale.view(-1, *(1,) * (weight.ndim - 1))
        self.state[f"{conv}.weight"] = (weight.to(scale.dtype) * scale).to(weight.dtype)
        self.state[f"{conv}.bias"] = constants.shift.to(weight.dtype)
        for key in ("weight", "bias"):
            self.state.pop(f"{norm}.{key}", None)
        constants.cast_(weight.dtype)
        self.constants[norm] = constants

    def _fold_affine(self, model: nn.Module, norm: str) -> None:
        module = _as_norm(model.get_submodule(norm))
        constants = NormConstants(module)
        constants.cast_(constants.scale.dtype if module.running_mean is None else module.running_mean.dtype)
        self.state[f"{norm}.weight"], self.state[f"{norm}.bias"] = constants.scale, constants.shift
        self.constants[norm] = constants

    def tangents(self, deltas: Mapping[str, Tensor]) -> Tensors:
        """Map a direction in the original parameters to the tensors that the copy uses.

        Args:
            deltas: Direction by original parameter name; parameters that are left out do not move.

        Returns:
            Direction by name in `state`, for the tensors that move and no others.
        """
        mapped = dict(deltas)
        for conv, norm in self.plan.pairs:
            self._map_pair(mapped, conv, norm)
        for norm in self.plan.affine:
            self._map_affine(mapped, norm)
        return {name: tensor.to(self.state[name].dtype) for name, tensor in mapped.items()}

    def _map_pair(self, mapped: Tensors, conv: str, norm: str) -> None:
        constants = self.constants[norm]
        weight, bias = mapped.pop(f"{conv}.weight", None), mapped.pop(f"{conv}.bias", None)
        gamma, beta = mapped.pop(f"{norm}.weight", None), mapped.pop(f"{norm}.bias", None)
        original = self.original[f"{conv}.weight"]
        shape = (-1, *(1,) * (original.ndim - 1))
        if weight is not None:
            weight = weight * constants.scale.view(shape)
        if gamma is not None:
            growth = (gamma * constants.inverse).view(shape)
            weight = original * growth if weight is None else torch.addcmul(weight, original, growth)
            beta = gamma * constants.center if beta is None else torch.addcmul(beta, gamma, constants.center)
        if bias is not None:
            beta = bias * constants.scale if beta is None else torch.addcmul(beta, bias, constants.scale)
        if weight is not None:
            mapped[f"{conv}.weight"] = weight
        if beta is not None:
            mapped[f"{conv}.bias"] = beta

    def _map_affine(self, mapped: Tensors, norm: str) -> None:
        constants = self.constants[norm]
        gamma, beta = mapped.pop(f"{norm}.weight", None), mapped.pop(f"{norm}.bias", None)
        if gamma is not None:
            mapped[f"{norm}.weight"] = gamma * constants.inverse
            beta = gamma * constants.center if beta is None else torch.addcmul(beta, gamma, constants.center)
        if beta is not None:
            mapped[f"{norm}.bias"] = beta

    def _call(self, state: Tensors, x: Tensor) -> Tensor:
        output: Tensor = functional_call(self.structure, state, (x,), tie_weights=False)
        return output

    def value(self, x: Tensor) -> Tensor:
        """Evaluate the network at `w0`.

        Args:
            x: Input (B, ...).

        Returns:
            `f0(x)` (B, C).
        """
        return self._call(self.state, x)

    def pushforward(self, deltas: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the network and its directional derivative in one pass (forward mode).

        Args:
            deltas: Direction by original parameter name.
            x: Input (B, ...).

        Returns:
            `f0(x)` and `J(x) d`, both (B, C). The second is differentiable in `deltas`.
        """
        tangents = self.tangents(deltas)
        moving = {name: self.state[name] for name in tangents}

        def run(primals: Tensors) -> Tensor:
            return self._call({**self.state, **primals}, x)

        with math_attention(self.has_fast_path):
            value, derivative, *_ = jvp(run, (moving,), (tangents,))
        return value, derivative

    def straight_through(self, deltas: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Evaluate `f0(x) + J(x) d` with its exact gradient from reverse mode alone.

        `f(w0 + d - stop(d)) + stop(J d)`: the first term has the value `f0` and the gradient `J^T`. One unit of
        work more than `pushforward`, but only first derivatives of every operator are needed.

        Args:
            deltas: Direction by original parameter name.
            x: Input (B, ...).

        Returns:
            Output (B, C).
        """
        with torch.no_grad():
            _, derivative = self.pushforward(deltas, x)
        tangents = self.tangents(deltas)
        moved = {name: self.state[name] + (tangent - tangent.detach()) for name, tangent in tangents.items()}
        return self._call({**self.state, **moved}, x) + derivative


def _as_norm(module: nn.Module) -> _BatchNorm:
    if not isinstance(module, _BatchNorm):
        raise TypeError(f"expected a batch normalization, got {type(module).__name__}")
    return module
