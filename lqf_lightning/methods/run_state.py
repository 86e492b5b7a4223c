"""What keeps ranks and resumed runs equal to the run that was never divided nor interrupted."""

import math
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lqf_lightning.methods.rank_buffers import agree_on_buffers, broadcast_buffers_in_forward


class RunState(LightningModule):
    """Buffers that agree when networks are evaluated, and random numbers that go on where they were."""

    moves_buffers = True  # whether training changes buffers (batch-norm statistics), so that ranks must agree on them
    _random_state: Tensor | None = None

    def on_validation_start(self) -> None:
        """Evaluate the same network on every rank."""
        super().on_validation_start()
        agree_on_buffers(self.trainer.strategy.model, self.moves_buffers)

    def on_validation_end(self) -> None:
        """Let training synchronize buffers again."""
        super().on_validation_end()
        broadcast_buffers_in_forward(self.trainer.strategy.model, self.moves_buffers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the planned steps, and the random state: a resumed run draws what the uninterrupted one would."""
        super().on_save_checkpoint(checkpoint)
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        planned = self.trainer.estimated_stepping_batches if fits else math.inf
        checkpoint["planned_steps"] = None if planned == math.inf else int(planned)
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the random state back; it is set when training goes on."""
        super().on_load_checkpoint(checkpoint)
        self._random_state = checkpoint.get("random_state")

    def on_train_start(self) -> None:
        """Go on from the random state and the position in the epoch of the checkpoint, if there is one."""
        super().on_train_start()
        # Lightning 2.6 tells new loaders where they were. Where a schedule has asked for the number of steps, they are
        # made before the checkpoint is read, and are not told; where they have been, nothing is left to tell.
        self.trainer.fit_loop._load_combined_loader_states()
        broadcast_buffers_in_forward(self.trainer.strategy.model, self.moves_buffers)
        if self._random_state is not None:
            torch.set_rng_state(self._random_state.cpu())
        self._random_state = None
