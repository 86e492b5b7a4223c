"""How good the features are by now, without training anything: the nearest neighbors' vote."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lqf_lightning.backbones import Backbone, penultimate_features
from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.data import Batch, ImageDataModule
from lqf_lightning.linear import current_reducer
from lqf_lightning.methods import Method
from lqf_lightning.progress import track
from lqf_lightning.teachers.nearest_neighbors import neighbor_votes

from .drawn_loader import draw_at_most


class KNN(Callback):
    """Reports ``val/knn_acc`` of the penultimate features and ``val/teacher_knn_acc`` of an averaged teacher's.

    Every validation sample is classified by the vote of the labeled training samples whose features point most nearly
    in its direction, all of them as they are evaluated, without augmentation; the same with ``test/`` for a test. Of
    equally many votes the class with the lower position wins. The memory is the whole labeled training set up to
    `max_memory` samples, else so many of it, drawn once by lot and the same in all runs. It costs a forward pass over
    the memory and over the validation set, and is exact on any number of ranks.

    Args:
        k: Number of neighbors.
        temperature: Weights neighbors by ``exp(similarity / temperature)``; None: one vote each.
        max_memory: Most training samples to compare with.
        every_n_epochs: Epochs between two reports; the last epoch and separate evaluations have one in any case.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(
        self, k: int = 20, temperature: float | None = None, max_memory: int = 5000, every_n_epochs: int = 1
    ) -> None:
        options = {"k": (k, 20), "temperature": (temperature, 0.07)}
        options |= {"max_memory": (max_memory, 5000), "every_n_epochs": (every_n_epochs, 1)}
        for name, (value, usual) in options.items():
            if value is not None and not value > 0:
                raise ValueError(
                    f"`{name}` of the nearest neighbors must be positive, got {value}. Set callbacks.knn.{name}={usual}"
                )
        self.k, self.temperature, self.max_memory, self.every_n_epochs = k, temperature, max_memory, every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be reported.

        Raises:
            ValueError: The method has no network that trains, the memory is too small, or nothing is validated.
        """
        data, method = _data_and_method(trainer, pl_module)
        if not method.networks():
            raise ValueError(
                f"{type(method).__name__} trains no network whose features could be compared: they stay those of the "
                "pre-trained one. Set callbacks=[linear_probe]"
            )
        number = min(len(data.fixed_train_dataloader().dataset), self.max_memory)  # type: ignore[arg-type]  # is sized
        if self.k > number:
            raise ValueError(
                f"cannot ask {self.k} neighbors in a memory of {number} training samples. Set callbacks.knn.k="
                f"{max(1, number // 2)}, or a larger callbacks.knn.max_memory if the data has more"
            )
        if stage == "fit" and not (len(data.val_dataloader()) and trainer.limit_val_batches):
            raise ValueError(
                "nearest neighbors classify the validation samples, and there are none. Set data.val_fraction=0.1 and "
                "trainer.limit_val_batches=1.0, or callbacks=[learning_curves]"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report beside the method's own accuracy."""
        epoch = trainer.current_epoch + 1
        due = epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs
        if not trainer.sanity_checking and (due or trainer.state.fn != TrainerFn.FITTING):
            self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report beside the method's own accuracy."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        data, method = _data_and_method(trainer, module)
        networks = method.networks()
        queries = data.val_dataloader() if stage == "val" else data.test_dataloader()
        with ExitStack() as stack:
            # Iterating over a loader draws a number, which training shall not miss.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for network in networks.values():
                stack.enter_context(evaluation_mode(network.model))
            memory, label = _memory(method, networks, draw_at_most(self.max_memory, data.fixed_train_dataloader()))
            right = torch.zeros(len(networks) + 1, dtype=torch.float64, device=method.device)
            for batch in _batches(method, queries, f"nearest neighbors: {stage}"):
                for place, (name, network) in enumerate(networks.items()):
                    features = _features(network, batch.input)
                    votes = neighbor_votes(features, memory[name], label, data.num_classes, self.k, self.temperature)
                    right[place] += (votes.argmax(1) == batch.target).sum()
                right[-1] += len(batch.target)
        current_reducer().sum_(right)
        for name, accuracy in zip(networks, (right[:-1] / right[-1]).tolist(), strict=True):
            prefix = "" if name == "student" else f"{name}_"
            module.log(f"{stage}/{prefix}knn_acc", accuracy, sync_dist=True)  # equal on all ranks by now


def _data_and_method(trainer: Trainer, module: LightningModule) -> tuple[ImageDataModule, Method]:
    # Lightning sets `datamodule` at run time and does not declare it.
    return cast(ImageDataModule, trainer.datamodule), cast(Method, module)  # type: ignore[attr-defined]


def _memory(method: Method, networks: dict[str, Backbone], loader: Any) -> tuple[dict[str, Tensor], Tensor]:
    # Features of all ranks by network, in order of index, and their classes.
    parts = {name: [_features(network, None)] for name, network in networks.items()}
    label = [torch.zeros(0, dtype=torch.int64, device=method.device)]
    index = [label[0]]
    for batch in _batches(method, loader, "nearest neighbors: memory"):
        for name, network in networks.items():
            parts[name].append(_features(network, batch.input))
        label.append(batch.target)
        index.append(batch.index)
    reducer, rows = current_reducer(), torch.cat(index)
    gathered = {name: reducer.gather_rows(torch.cat(part), rows)[0] for name, part in parts.items()}
    return gathered, reducer.gather_rows(torch.cat(label), rows)[0]


def _batches(method: Method, loader: Any, description: str) -> Iterator[Batch]:
    for batch in track(loader, description, total=len(loader)):
        if len(batch.target):
            yield method.transfer_batch_to_device(batch, method.device, 0)


@torch.no_grad()
def _features(network: Backbone, images: Tensor | None) -> Tensor:
    # Without images no rows, as wide as the others: a rank without samples takes part in what the ranks exchange.
    # An averaged teacher may be wider than the precision of the run, so its weights say what it computes in.
    weight = cast(Tensor, network.model.get_submodule(network.head).weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if images is None:
        return weight.new_zeros(0, weight[0].numel(), dtype=dtype)
    return penultimate_features(network, images.to(weight.dtype)).to(dtype)
