"""A teacher that is the running average of its student, normalization included."""

import copy
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lqf_lightning.teachers.momentum import MomentumSchedule
from lqf_lightning.teachers.paired_state import pair_states
from lqf_lightning.teachers.teacher import Teacher, at_least_single, wide_type

Statistics = Literal["averaged", "copied", "batch"]


class EMANTeacher(Teacher):
    """Exponential moving average of a student with exponential moving average normalization (Cai et al., CVPR 2021).

    ``theta' <- m theta' + (1 - m) theta`` for every floating-point entry of the state dict: weights, and the running
    means and variances of batch norm too. Integers (`num_batches_tracked`) are copied. The teacher normalizes by what
    it has averaged and never by its own batches, so that its answer on an image depends on that image alone.

    The copy is made here: load the student's weights before. Register the teacher as a submodule of what owns the
    student, and every method of this package updates it after each optimizer step. The average is kept in single
    precision whatever the run computes in.

    Args:
        student: The network to follow, not wrapped.
        momentum: The number m, or its schedule.
        statistics: "averaged" is EMAN. The baselines: "copied" takes the running statistics of the student as they
            are; "batch" normalizes by the batch at hand in training, and averages weights alone.
        sync_statistics: Average the student's running statistics over the ranks before they are taken; without it,
            those of every rank's own batches count until rank 0 wins at the next forward pass.

    Attributes:
        model: The averaged network.
        updates: How many updates there were; it is part of the state dict.
        total_updates: Of the whole run, for momentum schedules that end; set by the method at the start.

    Raises:
        TypeError: The student is a wrapper of the network.
        ValueError: `statistics` has another name, or the student holds an averaged teacher itself.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(student.weight)
        >>> teacher = EMANTeacher(student, momentum=0.75)
        >>> _ = nn.init.constant_(student.weight, 5.0)
        >>> teacher.update(), teacher.model.weight.item()
        (0.75, 2.0)
    """

    def __init__(
        self,
        student: nn.Module,
        momentum: float | MomentumSchedule = 0.999,
        *,
        statistics: Statistics = "averaged",
        sync_statistics: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(student, (DataParallel, DistributedDataParallel)) or hasattr(student, "_orig_mod"):
            raise TypeError(f"got a student wrapped in {type(student).__name__}, expected the network inside it")
        if any(isinstance(module, EMANTeacher) for module in student.modules()):
            raise ValueError(
                "the student holds an averaged teacher, which would be averaged too; give the network alone"
            )
        if statistics not in ("averaged", "copied", "batch"):
            raise ValueError(
                f"`statistics` must be 'averaged', 'copied' or 'batch', got {statistics!r}. Set method.teacher=eman"
            )
        self.momentum = momentum if isinstance(momentum, MomentumSchedule) else MomentumSchedule(momentum)
        self.statistics, self.sync_statistics = statistics, sync_statistics
        self.updates = 0
        self.total_updates: int | None = None
        self._student = (student,)  # a tuple keeps it out of the modules
        self.model = copy.deepcopy(student).requires_grad_(False)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.grad = None
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(wide_type(tensor.dtype))
        self.eval()

    @torch.no_grad()
    def update(self) -> float:
        """Follow the student by one step.

        Returns:
            The momentum of this step.
        """
        momentum = self.momentum.at(self.updates, self.total_updates)
        pairs = pair_states(self.model, self._student[0])
        pairs.weights.average(1 - momentum)
        if self.statistics != "batch":
            statistics = pairs.statistics.over_ranks() if self.sync_statistics else pairs.statistics
            statistics.average(1 - momentum if self.statistics == "averaged" else 1)
            pairs.integers.copy()
        self.updates += 1
        return momentum

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """Answer.

        Args:
            *inputs: What the student takes.

        Returns:
            What the student returns, detached and at least in single precision. Inputs in half precision outside
            autocast are computed with in half precision, though the weights are kept in single.
        """
        first = next((value for value in inputs if isinstance(value, Tensor)), None)
        narrow = first is not None and first.is_floating_point() and wide_type(first.dtype) != first.dtype
        if first is None or not narrow or torch.is_autocast_enabled(first.device.type):
            return at_least_single(self.model(*inputs))
        with torch.autocast(first.device.type, dtype=first.dtype):
            return at_least_single(self.model(*inputs))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode; with "batch" statistics, batch norms follow the mode.

        Args:
            mode: Heeded by batch norms of a teacher with "batch" statistics alone.

        Returns:
            The teacher itself.
        """
        super().train(False)
        if mode and self.statistics == "batch":
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
        return self

    def copied(self, module: nn.Module) -> nn.Module | None:
        """The teacher's counterpart of a part of the student.

        Args:
            module: The student, or a module inside it.

        Returns:
            The module at the same place of the average; None if it is no part of the student.
        """
        names = (name for name, part in self._student[0].named_modules() if part is module)
        name = next(names, None)
        return None if name is None else self.model.get_submodule(name)

    def get_extra_state(self) -> Tensor:
        """Keep the number of updates in the state dict, as a tensor, as all of a state dict are.

        Returns:
            A tensor without dimensions.
        """
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the number of updates from a state dict.

        Args:
            state: What `get_extra_state` returned.
        """
        self.updates = int(state)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Whoever moves the method to half precision means its student: increments of 1 - m would be lost in an average
        # with eight bits.
        def keep_width(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.is_floating_point() and wide_type(moved.dtype) != moved.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]  # torch gives this hook no types
        return self
