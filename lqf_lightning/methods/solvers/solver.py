"""What all solvers of the linear-quadratic problem have in common."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from lqf_lightning.data import Batch

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

SolverName = Literal["auto", "sgd", "cg", "kernel"]


class Solver:
    """The part of `LQF` that finds dw; the method calls it at the moments that Lightning calls the method.

    Args:
        method: The method that is trained.

    Attributes:
        name: As in ``method.solver``.
        sweeps: How often an epoch goes through the training samples as they are evaluated: in order, fixed,
            unpadded. 0 means ordinary training batches and Lightning's own optimization.
    """

    name: str
    sweeps = 0

    def __init__(self, method: "LQF") -> None:
        self.method = method

    def check(self) -> None:
        """Refuse a trainer or data that the solver cannot work with, before anything is computed."""

    def start(self) -> None:
        """Prepare, at the beginning of a fit."""

    def step(self, batch: Batch, number: int) -> dict[str, Tensor] | None:
        """Work on one batch; only called if there are sweeps.

        Args:
            batch: Samples of this rank, possibly none.
            number: Of the batch in the epoch.

        Returns:
            What a training step returns, if the outputs on the batch are known.

        Raises:
            NotImplementedError: The solver has no sweeps.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no sweeps")

    def data_module(self) -> Any:
        """The data module of the run, which gives training samples as they are evaluated.

        Returns:
            The data module.

        Raises:
            TypeError: It cannot.
        """
        data = cast(Any, self.method.trainer).datamodule
        if not hasattr(data, "fixed_train_dataloader") or (self.sweeps and not hasattr(data, "sweeps")):
            raise TypeError(
                "LQF looks at training samples before the first step, through the data module's "
                f"`fixed_train_dataloader()`, and exact solvers sweep over them (`sweeps`); got {type(data).__name__}. "
                "Use ImageDataModule, give yours these, or set method.preconditioner=null, "
                "method.normalize_step=false and method.solver=sgd"
            )
        return data

    def before_optimizer_step(self) -> None:
        """Change the gradients; only called if there are no sweeps."""

    def end_epoch(self) -> None:
        """Look back on an epoch, and stop the run if there is nothing left to do."""

    def finish(self) -> None:
        """Look back on the training, when it ends without an error."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold for an exact resumption, beside dw.

        Returns:
            Tensors and plain values.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; called before `start`.

        Args:
            state: From a checkpoint.
        """
