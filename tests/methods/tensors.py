"""A network of a few dozen weights, data in memory, and a Trainer that does nothing else."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lqf_lightning.backbones import Backbone
from lqf_lightning.data import Batch
from lqf_lightning.data.sampler import SweepSampler
from lqf_lightning.methods import Method

CLASSES = ["ant", "bee", "cat"]
SGD = partial(torch.optim.SGD, lr=0.1)


def build_backbone(seed: int = 0, dtype: torch.dtype = torch.float64) -> Backbone:
    """Two convolutions with batch norm between images of 6 pixels and three classes; smooth, so that it is exact."""
    torch.manual_seed(seed)
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 2, 3, bias=False), bn1=nn.BatchNorm2d(2), act1=nn.Tanh(),
        conv2=nn.Conv2d(2, 3, 3, bias=False), bn2=nn.BatchNorm2d(3), act2=nn.Tanh(), drop=nn.Dropout(0.5),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(3, 3),
    )  # fmt: skip
    model = nn.Sequential(layers).to(dtype).eval()
    for norm in (model.bn1, model.bn2):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    groups = {
        "stem": ("conv1.weight", "bn1.weight", "bn1.bias"),
        "stage1": ("conv2.weight", "bn2.weight", "bn2.bias"),
        "head": ("fc.weight", "fc.bias"),
    }
    return Backbone("tiny", model, (0.5,) * 3, (0.5,) * 3, "fc", groups, 6, "random")


def draw(number: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and labels, every class about equally often."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.arange(number) % len(CLASSES)


class TensorData(LightningDataModule):
    """Samples in order; to evaluate on, the same as to train on unless others are given (None: there are none)."""

    num_classes = len(CLASSES)

    def __init__(
        self, images: Tensor, target: Tensor, batch_size: int | None = None, **others: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__()
        self.splits = dict.fromkeys(("train", "val", "test"), (images, target)) | others
        self.batch_size = batch_size or len(target)
        self.sweeps = 0

    def train_dataloader(self) -> Any:
        return self._load("train", max(1, self.sweeps))

    def fixed_train_dataloader(self) -> Any:
        return self._load("train")

    def val_dataloader(self) -> Any:
        return self._load("val")

    def test_dataloader(self) -> Any:
        return self._load("test")

    def _load(self, split: str, times: int = 1) -> DataLoader[Batch] | list[Any]:
        samples = self.splits[split]
        if samples is None:
            return []
        rows = TensorDataset(*samples, torch.arange(len(samples[1])))
        batches = SweepSampler(len(rows), times, batch_size=self.batch_size)
        return DataLoader(rows, batch_sampler=batches, collate_fn=lambda rows: Batch(*default_collate(rows)))


def build_trainer(epochs: int, *callbacks: Callback, **options: Any) -> Trainer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        return Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, callbacks=list(callbacks), logger=False, **{
                "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
                "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1, **options,
            },
        )  # fmt: skip


def fit(method: Method, images: Tensor, target: Tensor, epochs: int = 1, batch_size: int | None = None) -> Trainer:
    """Train; one epoch without `batch_size` is one step on all samples."""
    trainer = build_trainer(epochs)
    fit_on(trainer, method, TensorData(images, target, batch_size))
    return trainer


def fit_on(trainer: Trainer, method: Method, data: TensorData, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.fit(method, datamodule=data, **options)


def snapshot(method: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}


def gradient(loss: Callable[[nn.Module], Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, by plain reverse mode, wherever training has frozen it."""
    named = dict(model.named_parameters())
    copies = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
    value = torch.func.functional_call(_Loss(model, loss), {f"model.{n}": p for n, p in copies.items()}, ())
    return dict(zip(named, torch.autograd.grad(value, list(copies.values())), strict=True))


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> Tensor:
        return self.loss(self.model)
