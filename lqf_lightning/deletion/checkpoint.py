"""The checkpoint of a model that forgot: nothing of the training but the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# All that evaluation, scoring and export read. What is not listed stays behind: states of optimizers, solvers,
# samplers and callbacks hold gradients or columns per sample, and what a later version adds may do so too.
_KEPT = (
    "epoch", "global_step", "pytorch-lightning_version", "hparams_name", "hparams_type", "hyper_parameters",
    "planned_steps", "networks", "head_is_trained", "ridge", "core", "datamodule_hparams_name",
)  # fmt: skip


def scrubbed_checkpoint(
    content: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    prefix: str,
    buffers: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Take over from a checkpoint what knows no sample, and put new weights in the place of the old ones.

    Args:
        content: The checkpoint of the finished run.
        weights: New weights by `method.trained()` name.
        prefix: What stands before these names in the state dict: ``linearized.dw.`` or ``backbone.model.``.
        buffers: Other entries that are replaced, by their whole name in the state dict.
        start: The state dict before training; with it, entries that training changed have to be replaced. None: the
            caller knows that only the weights train.

    Returns:
        A checkpoint that can be tested, scored and exported, but not trained on.

    Raises:
        KeyError: The checkpoint has no such entry.
        ValueError: A new entry has another shape, or an entry that learned from the samples would stay.
    """
    old: dict[str, Tensor] = dict(content["state_dict"])
    new = {prefix + name: value for name, value in weights.items()} | dict(buffers or {})
    if missing := sorted(set(new) - set(old)):
        raise KeyError(f"the checkpoint has no {missing[0]} ({len(missing)} of {len(new)} new entries are missing)")
    for name, value in new.items():
        if value.shape != old[name].shape:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected {tuple(old[name].shape)}")
    _refuse_learned({name: value for name, value in old.items() if name not in new}, start)
    state = {name: _plain(new.get(name, value), value) for name, value in old.items()}
    return {name: content[name] for name in _KEPT if name in content} | {"state_dict": state}


def write_checkpoint(content: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint that is there whole or not at all.

    Args:
        content: The checkpoint.
        file: Where to; folders are made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    torch.save(dict(content), partial)
    partial.replace(file)


def _plain(value: Tensor, like: Tensor) -> Tensor:
    # A copy of its own: a view would take the memory that it looks at along into the file.
    return value.detach().to(device="cpu", dtype=like.dtype).clone()


def _refuse_learned(stays: Mapping[str, Tensor], start: Mapping[str, Tensor] | None) -> None:
    if start is None:
        return
    learned = [name for name, value in stays.items() if name not in start or not _equal(value, start[name])]
    if learned:
        raise ValueError(
            f"{len(learned)} entries of the checkpoint are not what they were before training, and would stay: "
            f"{', '.join(learned[:5])}. They may have learned from the cohort; a scrub has to replace them"
        )


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.cpu(), second.cpu().to(first.dtype))
