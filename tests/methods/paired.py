"""What the methods with averaged teachers train on in tests: pairs of views in memory, and runs that are watched."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lqf_lightning.data import Batch
from lqf_lightning.methods import Method
from lqf_lightning.teachers import EMANTeacher
from methods.tensors import CLASSES, SGD, TensorData, build_backbone


def views(image: Tensor) -> tuple[Tensor, Tensor]:
    """Two images that show the same: darker, and upside down."""
    return 0.7 * image, image.flip(-2) + 0.1


class PairData(TensorData):
    """Every training sample in two views, in order and in full batches."""

    def train_dataloader(self) -> Any:
        images, target = self.splits["train"]
        return load_pairs(images, target, self.batch_size)


class LabeledAndUnlabeled(TensorData):
    """A labeled batch in its own size beside a batch of all samples in two views, without their labels."""

    def __init__(self, images: Tensor, target: Tensor, batch_size: int, ratio: int = 2, **others: Any) -> None:
        super().__init__(images, target, batch_size, **others)
        self.ratio = ratio

    def train_dataloader(self) -> Any:
        images, target = self.splits["train"]
        rows = TensorDataset(images, target, torch.arange(len(target)))
        labeled = DataLoader(rows, batch_size=self.batch_size, collate_fn=lambda rows: Batch(*default_collate(rows)))
        unlabeled = load_pairs(images, torch.full_like(target, -1), self.ratio * self.batch_size)
        return CombinedLoader({"labeled": labeled, "unlabeled": unlabeled}, mode="min_size")


def load_pairs(images: Tensor, target: Tensor, batch_size: int) -> DataLoader[Batch]:
    """Batches of two views, the target and the index."""
    rows = TensorDataset(*views(images), target, torch.arange(len(target)))
    return DataLoader(
        rows, batch_size=batch_size, drop_last=True,
        collate_fn=lambda rows: Batch((torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])),
                                      *default_collate([r[2:] for r in rows])),
    )  # fmt: skip


def build(kind: type[Method], seed: int = 0, **options: Any) -> Any:
    """A method around the tiny network, without dropout, in double precision."""
    backbone = build_backbone(seed)
    backbone.model.drop.p = 0.0
    usual = {"optimizer": SGD, "views": lambda **_: views, "momentum_warmup": False}
    return kind(backbone, CLASSES, **{**usual, **options}).double()


def buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """Running means and variances."""
    return {name: value.clone() for name, value in module.named_buffers() if value.is_floating_point()}


class CrashAtStep(Callback):
    """Raises before the batch after a number of optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("pulled the plug")


class Watch(Callback):
    """Writes what every rank saw at every step, beside an averaged teacher that is no part of the method."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        wrapped = trainer.strategy.model
        self.seen: dict[str, Any] = {"steps": [], "keys": [], "labels": [], "losses": []}
        self.seen["ignored"] = sorted(getattr(wrapped, "parameters_to_ignore", ()))
        self.seen["broadcast"] = sorted(getattr(wrapped, "named_module_buffers", ()))
        self.outside = EMANTeacher(getattr(pl_module, "student", pl_module.model), momentum=0.5)
        if hasattr(pl_module, "queue"):
            self.seen["first queue"] = pl_module.queue.keys.clone()
            self._watch_queue(pl_module.queue)

    def on_before_backward(self, trainer, pl_module, loss):
        self.after_forward = (buffers(pl_module.averaged_teacher), buffers(self.outside))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        teacher = pl_module.averaged_teacher
        weights = {name: value.clone() for name, value in teacher.model.named_parameters()}
        self.outside.update()
        inside, outside = self.after_forward
        step = {"weights": weights, "buffers": buffers(teacher), "inside": inside, "outside": outside}
        self.seen["steps"].append(step)
        self.seen["losses"].append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module):
        if hasattr(pl_module, "queue"):
            self.seen["queue"] = {"keys": pl_module.queue.keys, "labels": pl_module.queue.labels}
            self.seen["position"] = pl_module.queue.position
        torch.save(self.seen, self.folder / f"rank{trainer.global_rank}.pt")

    def _watch_queue(self, queue) -> None:
        enqueue = queue.enqueue

        def watched(keys, labels):
            self.seen["keys"].append(keys.clone())
            self.seen["labels"].append(labels.clone())
            enqueue(keys, labels)

        queue.enqueue = watched
