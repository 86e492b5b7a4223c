"""Attention that can be differentiated in forward mode: the right kernels, and no remembered biases."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def math_attention(fast_path: bool = True) -> Iterator[None]:
    """Let attention run in the form that forward-mode differentiation supports.

    The fused kernels (flash, memory-efficient, and the inference fast path of `nn.MultiheadAttention`) have no
    forward derivative, on no device (https://github.com/pytorch/pytorch/issues/98164). Reverse mode is not affected.

    Args:
        fast_path: Whether the fast path has to be switched as well; False suits networks that cannot reach it, and
            torch.compile, which does not follow that switch.

    Yields:
        Nothing; the former setting returns at the end.
    """
    if not fast_path:
        with sdpa_kernel(SDPBackend.MATH):
            yield
        return
    former = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(former)


class _Forgetful(dict[Any, Any]):
    """A dictionary that hands every value out once."""

    def __getitem__(self, key: Any) -> Any:
        return self.pop(key)


def forget_attention_biases(model: nn.Module) -> None:
    """Make evaluation-mode attention compute its biases anew in every pass.

    timm's LevIT, TinyViT and EfficientFormer keep them across passes in a dictionary. A kept tensor carries the
    derivative of another pass: the biases would silently have no tangent, and the network could not be copied.

    Args:
        model: Network whose modules are changed in place; its values stay the same.
    """
    for module in model.modules():
        if isinstance(vars(module).get("attention_bias_cache"), dict):
            module.attention_bias_cache = _Forgetful()  # type: ignore[assignment]
