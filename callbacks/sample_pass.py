"""One pass over fixed images that notes how the method does on each, and leaves no trace."""

from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer

from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.copies import refuse_copies
from lqf_lightning.data.sample_ledger import SampleLedger
from lqf_lightning.information.sample_outcomes import sample_outcomes
from lqf_lightning.methods import Method
from lqf_lightning.methods.rank_buffers import agree_on_buffers, broadcast_buffers_in_forward
from lqf_lightning.progress import track


def data_and_method(trainer: Trainer, module: LightningModule) -> tuple[ImageDataModule, Method]:
    """The data and the method of a run.

    Args:
        trainer: The running trainer.
        module: What it runs.

    Returns:
        Both.

    Raises:
        TypeError: The data do not tell samples by index.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise TypeError(
            "what is noted of samples needs an ImageDataModule, whose manifest tells which sample is which, got "
            f"{data!r}. Set data=folder, or leave the callback out"
        )
    refuse_copies(data, "notes of what training does on each sample")
    return data, cast(Method, module)


@torch.no_grad()
def note_samples(ledger: SampleLedger, trainer: Trainer, method: Method, loader: Any, description: str) -> None:
    """Evaluate the method on samples; every process has to call it.

    The network is in evaluation mode and the same on all ranks, in the precision of the run. Modes and random numbers
    are afterwards what they were.

    Args:
        ledger: Takes the columns of `sample_outcomes` that it has.
        trainer: The running trainer.
        method: What is evaluated.
        loader: Batches of this process, possibly without samples.
        description: For the progress bar.
    """
    precision = trainer.precision_plugin
    agree_on_buffers(trainer.strategy.model, method.moves_buffers)
    with ExitStack() as stack:
        # Iterating over a loader draws a number, which training shall not miss.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(evaluation_mode(method))
        stack.enter_context(precision.val_step_context())
        for batch in track(loader, description, total=len(loader)):
            if len(batch.target):
                moved = method.transfer_batch_to_device(precision.convert_input(batch), method.device, 0)
                found = sample_outcomes(method(moved.input), moved.target)
                ledger.add(moved.index, **{name: found[name] for name in ledger.columns})
    broadcast_buffers_in_forward(trainer.strategy.model, method.moves_buffers)
