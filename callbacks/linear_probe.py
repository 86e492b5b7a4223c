"""The yardstick of every method: a ridge classifier on the frozen pre-trained features."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqf_lightning.backbones import penultimate_features
from lqf_lightning.data import ImageDataModule
from lqf_lightning.linear import Reducer, RidgeProbe, current_reducer
from lqf_lightning.methods import Method
from lqf_lightning.progress import track

RIDGES = tuple(10.0**power for power in range(-6, 2))


class LinearProbe(Callback):
    """Fits a linear probe before training and reports ``val/linear_probe_acc`` and ``test/linear_probe_acc``.

    The probe is a ridge regression on one-hot targets; its ridge is the one of `ridges` with the best validation
    accuracy, or the middle one where no sample is held out. It costs one forward pass over all sets, exact on any
    number of ranks. A resumed run keeps the result, because by then the features are no longer the pre-trained ones.

    Args:
        ridges: Candidates, relative to the mean variance of the features.
    """

    def __init__(self, ridges: Iterable[float] = RIDGES) -> None:
        self.ridges = tuple(ridges)
        self.accuracy: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit on the training set, choose the ridge on the validation set, measure on the test set."""
        # Lightning sets `datamodule` at run time and does not declare it.
        data, method = cast(ImageDataModule, trainer.datamodule), cast(Method, pl_module)  # type: ignore[attr-defined]
        if self.accuracy:
            return
        if trainer.ckpt_path and _body_trains(method):
            rank_zero_warn(
                "no linear probe: the checkpoint was written without one, and its features are no longer the "
                "pre-trained ones. Set callbacks=[learning_curves], or ckpt_path=null to start over."
            )
            return
        with torch.random.fork_rng(devices=[]):  # iterating over a loader draws a number, which training shall not miss
            self.accuracy = self._measure(data, method, current_reducer())

    def _measure(self, data: ImageDataModule, method: Method, reducer: Reducer) -> dict[str, float]:
        probe = RidgeProbe(_width(method), data.num_classes, method.device)
        for features, target in _features(method, data.fixed_train_dataloader(), "linear probe: train"):
            probe.update(features, target)
        probe.reduce(reducer)
        weight, bias = probe.solve(self.ridges)
        loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
        measured = {
            stage: _accuracies(weight, bias, _features(method, loader, f"linear probe: {stage}"), reducer)
            for stage, loader in loaders.items()
            if len(loader)
        }
        best = int(measured["val"].argmax()) if "val" in measured else len(self.ridges) // 2
        return {stage: float(accuracies[best]) for stage, accuracies in measured.items()}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report beside the method's own accuracy, as a constant line."""
        self._report(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report beside the method's own accuracy."""
        self._report(pl_module, "test")

    def _report(self, module: LightningModule, stage: str) -> None:
        if stage in self.accuracy:  # equal on all ranks: the mean over ranks changes nothing
            module.log(f"{stage}/linear_probe_acc", self.accuracy[stage], sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Keep the result.

        Returns:
            Accuracies by stage.
        """
        return {"accuracy": self.accuracy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the result of the interrupted run."""
        self.accuracy = dict(state_dict["accuracy"])


@torch.no_grad()
def _features(method: Method, loader: Any, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    training = method.training
    method.eval()
    for batch in track(loader, description, total=len(loader)):
        if len(batch.target):
            batch = method.transfer_batch_to_device(batch, method.device, 0)
            batch = method.trainer.precision_plugin.convert_input(batch)
            yield penultimate_features(method.backbone, batch.input), batch.target
    method.train(training)


def _accuracies(weight: Tensor, bias: Tensor, samples: Iterable[tuple[Tensor, Tensor]], reducer: Reducer) -> Tensor:
    # Share of right predictions for each of R classifiers, by counts summed over ranks.
    counts = torch.zeros(len(weight) + 1, dtype=torch.float64, device=weight.device)
    for features, target in samples:
        predicted = (torch.einsum("rcf,bf->rbc", weight, features.double()) + bias[:, None]).argmax(-1)
        counts[:-1] += (predicted == target).sum(1)
        counts[-1] += len(target)
    reducer.sum_(counts)
    return counts[:-1] / counts[-1]


def _body_trains(method: Method) -> bool:
    head = set(method.backbone.groups["head"])
    return any(p.requires_grad for name, p in method.backbone.model.named_parameters() if name not in head)


def _width(method: Method) -> int:
    head = method.backbone.model.get_submodule(method.backbone.head)
    weight = cast(Tensor, head.weight)
    return weight[0].numel()
