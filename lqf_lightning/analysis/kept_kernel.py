"""The kernel of the training samples, kept with a run so that requests need no new one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqf_lightning.linear import Kernel
from lqf_lightning.linear.restrict import restrict_kernel
from lqf_lightning.methods.solvers.tensor_folder import TensorFolder

_FILE = "train_kernel.safetensors"
_INDEX, _GROUP = "index", "group:"


@dataclass(frozen=True)
class KeptKernel:
    """A full kernel and whose it is.

    Attributes:
        groups: Matrices (1, n * C, n * C) by layer group, rows by sample, then by output.
        outputs: Number of outputs C.
        index: Index of the samples (n,), int64, ascending.

    Raises:
        ValueError: The parts do not fit together.

    Example:
        >>> import torch
        >>> kept = KeptKernel({"all": torch.arange(9.0).reshape(1, 3, 3)}, 1, torch.tensor([4, 7, 9]))
        >>> kept.without(torch.tensor([7])).groups["all"].tolist()
        [[[0.0, 2.0], [6.0, 8.0]]]
    """

    groups: Mapping[str, Tensor]
    outputs: int
    index: Tensor

    def __post_init__(self) -> None:
        rows = len(self.index) * self.outputs
        odd = {name: tuple(matrix.shape) for name, matrix in self.groups.items() if matrix.shape != (1, rows, rows)}
        if odd or not self.groups:
            raise ValueError(
                f"a full kernel of {len(self.index)} samples and {self.outputs} outputs has matrices (1, {rows}, "
                f"{rows}), got {odd or 'none'}"
            )
        if not bool((self.index[1:] > self.index[:-1]).all()):
            raise ValueError("the samples of a kept kernel must be in ascending order of their index, each once")

    @property
    def kernel(self) -> Kernel:
        """The kernel, for solvers."""
        return Kernel(self.groups, self.outputs, "full")

    def only(self, index: Tensor) -> Self:
        """Keep some samples; new matrices, which hold nothing of the others.

        Args:
            index: Index of the samples to keep (s,), any order.

        Returns:
            The kernel of these.

        Raises:
            ValueError: The kernel does not have one of them.
        """
        wanted = torch.unique(index.to(self.index))
        unknown = wanted[~torch.isin(wanted, self.index)].tolist()
        if unknown:
            raise ValueError(
                f"the kept kernel of {len(self.index)} samples does not have sample {unknown[0]}: it belongs to other "
                "training data. Set solver=newton, or leave the kernel out"
            )
        chosen = torch.searchsorted(self.index, wanted)
        kernel = restrict_kernel(self.kernel, rows=chosen, columns=chosen)
        return type(self)(kernel.groups, self.outputs, wanted)

    def without(self, indices: Tensor) -> Self:
        """Forget some samples.

        Args:
            indices: Index of the samples to forget; those that the kernel does not have play no part.

        Returns:
            The kernel of the others, in new matrices.
        """
        return self.only(self.index[~torch.isin(self.index, indices.to(self.index))])

    def to(self, device: torch.device) -> Self:
        """Move the matrices.

        Args:
            device: Where to.

        Returns:
            The same kernel.
        """
        groups = {name: matrix.to(device) for name, matrix in self.groups.items()}
        return type(self)(groups, self.outputs, self.index.to(device))

    def write(self, folder: str | Path) -> Path:
        """Keep the kernel in the folder of a run, whole or not at all; for one process to call.

        Args:
            folder: That of the run; made if it does not exist.

        Returns:
            The file.
        """
        final = Path(folder) / _FILE
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_suffix(f".{os.getpid()}.partial")
        tensors = {_GROUP + name: matrix.contiguous().cpu() for name, matrix in self.groups.items()}
        try:
            save_file(tensors | {_INDEX: self.index.cpu()}, partial, metadata={"outputs": str(self.outputs)})
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)
        return final

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """Find what `write` has kept.

        Args:
            folder: That of the run.

        Returns:
            The kernel, None if there is none.
        """
        file = Path(folder) / _FILE
        if not file.exists():
            return None
        with safe_open(file, "pt") as content:
            outputs = int(content.metadata()["outputs"])
        tensors = load_file(file)
        index = tensors.pop(_INDEX)
        return cls({name.removeprefix(_GROUP): matrix for name, matrix in tensors.items()}, outputs, index)

    @classmethod
    def from_parts(cls, folder: str | Path, index: Tensor) -> Self | None:
        """Collect the parts that an assembly has kept layer group by layer group, as in `method.kernel_folder`.

        What the parts know of their samples is a checksum; that these are the samples of `index` is the caller's word,
        which the certificate of whatever is solved with them puts to the test.

        Args:
            folder: The folder.
            index: Index of the samples that the run was trained on (n,), ascending.

        Returns:
            The kernel, None if the folder has no part of a full one.

        Raises:
            ValueError: The parts are of another number of samples.
        """
        if not Path(folder).is_dir():
            return None
        store, groups, outputs = TensorFolder(folder), {}, 0
        for key in store:
            group, part, form, sizes, *_ = key.rsplit(":", 5)
            if (part, form) != ("train", "full"):
                continue
            samples, _, outputs = (int(size) for size in sizes.split("x"))
            if samples != len(index):
                raise ValueError(f"{folder} has a kernel of {samples} samples, the run has trained on {len(index)}. "
                                 "Set solver=newton")  # fmt: skip
            groups[group] = store[key]
        return cls(groups, outputs, index) if groups else None
