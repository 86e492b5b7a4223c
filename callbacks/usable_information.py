"""What can be read out of the layers while the network trains: usable information, in bits."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lqf_lightning.backbones import Backbone
from lqf_lightning.backbones.group_features import group_features
from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.data import ImageDataModule
from lqf_lightning.information.usable_information import DECODERS, Parts, draw_parts, usable_information
from lqf_lightning.linear import current_reducer
from lqf_lightning.methods import Method
from lqf_lightning.progress import track

from .drawn_loader import draw_at_most
from .pictures import save_picture
from .usable_information_picture import draw_usable_information
from .variables import LABEL, Variables

_FILE = "usable_information.parquet"
_FEWEST = 4  # images: one for every part, and one more to fit on
_FIGURES = ("bits", "low", "high", "control", "entropy")
Samples = tuple[dict[str, Tensor], Tensor, Tensor]  # features by group, classes, indices


class UsableInformation(Callback):
    """Reports ``val/usable_bits/GROUP``: how many bits about the label a decoder reads out of a layer group's output.

    Decoders are fitted on training images as they are evaluated, chosen on some other images and judged on yet others
    (`usable_information`); ``usable_information.parquet`` has a row per epoch, group, variable and decoder, with the
    interval, the control with shuffled values and what there was to find out, and
    ``pictures/usable_information.png`` shows it over epochs. Epoch 0 is the network before training; a separate
    validation reports numbers only. Besides the label, columns of files tell how much the network knows about other
    things, under ``val/usable_bits_NAME/GROUP``. It costs a forward pass over the images and a few seconds of fitting,
    is the same on any number of ranks, and training does not notice.

    Args:
        report_on: "val": images that neither network nor decoder has been trained on, halves of which choose and
            judge; "train": parts of the training images.
        groups: Names of layer groups; None: all.
        decoders: Among "linear", "mlp" and "mlp2"; the first is the one that is logged.
        targets: Other variables by name, each a Parquet file with the columns `index` and that name.
        max_samples: Most training images, and most validation images, drawn by lot if there are more.
        every_n_epochs: Epochs between two reports; the last epoch and separate validations have one in any case.
        seed: Of the parts, the bootstrap and the control; the same images in every epoch.

    Attributes:
        rows: The table so far.

    Raises:
        ValueError: An option is outside its range.
    """

    def __init__(
        self,
        report_on: Literal["val", "train"] = "val",
        groups: Sequence[str] | None = None,
        decoders: Sequence[str] = ("linear",),
        targets: Mapping[str, str | Path] | None = None,
        max_samples: int = 2000,
        every_n_epochs: int = 1,
        seed: int = 0,
    ) -> None:
        if report_on not in ("val", "train"):
            raise ValueError(_wrong("report_on", report_on, "val or train", "val"))
        if not decoders or not set(decoders) <= set(DECODERS):
            raise ValueError(_wrong("decoders", list(decoders), f"some of {list(DECODERS)}", "[linear]"))
        for name, value, usual in (("max_samples", max_samples, 2000), ("every_n_epochs", every_n_epochs, 1)):
            if not value > 0:
                raise ValueError(_wrong(name, value, "a positive number", usual))
        self.report_on, self.groups, self.decoders = report_on, groups, tuple(decoders)
        self.variables = Variables(targets or {})
        self.max_samples, self.every_n_epochs, self.seed = max_samples, every_n_epochs, seed
        self.rows: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be reported.

        Raises:
            ValueError: The method has no network that trains, a layer group is unknown, there are too few images, or a
                variable is not known of all.
        """
        data, method = _data_and_method(trainer, pl_module)
        network = method.networks().get("student")
        if network is None:
            raise ValueError(
                f"{type(method).__name__} trains no network whose layers would come to know more: they stay those of "
                "the pre-trained one. Set callbacks=[linear_probe]"
            )
        if unknown := [name for name in self.groups or () if name not in network.groups]:
            raise ValueError(_wrong("groups", unknown, f"some of {list(network.groups)}", "null"))
        if self.report_on == "val" and not _validates(trainer):
            raise ValueError(
                "usable information is judged on validation images, and there are none. Set data.val_fraction=0.1 and "
                "trainer.limit_val_batches=1.0, or callbacks.usable_information.report_on=train"
            )
        judged = len((data.val_dataloader() if self.report_on == "val" else data.fixed_train_dataloader()).dataset)  # type: ignore[union-attr,arg-type]  # is sized
        if judged < _FEWEST:
            raise ValueError(
                f"usable information needs at least {_FEWEST} images of {self.report_on} to choose and judge on, got "
                f"{judged}. Set callbacks=[learning_curves]"
            )
        if self.variables.names:
            self.variables.check(data.manifest, ("train", "val") if self.report_on == "val" else ("train",))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where training begins, or goes on without a table."""
        if not self.rows:
            self._report(trainer, pl_module, trainer.current_epoch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report beside the method's own accuracy."""
        if not trainer.sanity_checking:
            self._report_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report after epochs of a run that validates nothing."""
        if not _validates(trainer):
            self._report_if_due(trainer, pl_module)

    def _report_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        due = epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs
        if trainer.state.fn == TrainerFn.FITTING and not due:
            return
        for row in self._report(trainer, pl_module, epoch):
            if row["decoder"] == self.decoders[0]:
                ending = "" if row["variable"] == LABEL else f"_{row['variable']}"
                name = f"val/usable_bits{ending}/{row['group']}"
                pl_module.log(name, row["bits"], sync_dist=True)  # equal on all ranks by now

    def _report(self, trainer: Trainer, module: LightningModule, epoch: int) -> list[dict[str, Any]]:
        data, method = _data_and_method(trainer, module)
        network = method.networks()["student"]
        with ExitStack() as stack:
            # Iterating over a loader draws a number, which training shall not miss.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(evaluation_mode(network.model))
            samples = [self._look(method, network, data.fixed_train_dataloader(), "train")]
            if self.report_on == "val":
                samples.append(self._look(method, network, data.val_dataloader(), "val"))
            fresh = self._measure(data, samples, epoch)
        if trainer.state.fn == TrainerFn.FITTING:  # else nobody knows which epoch the weights are of
            self.rows = [row for row in self.rows if row["epoch"] != epoch] + fresh
            self._write(trainer, upload=False)
        return fresh

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last epoch, whatever ended the training, and show the whole picture in the trackers."""
        if self.rows[-1]["epoch"] < trainer.current_epoch:
            self._report(trainer, pl_module, trainer.current_epoch)
        self._write(trainer, upload=True)

    def _write(self, trainer: Trainer, *, upload: bool) -> None:
        if trainer.is_global_zero and self.rows:
            folder, table = Path(trainer.default_root_dir), pd.DataFrame(self.rows)
            folder.mkdir(parents=True, exist_ok=True)
            table.to_parquet(folder / _FILE, index=False)
            save_picture(trainer, draw_usable_information(table), "usable_information", upload=upload)

    @torch.no_grad()
    def _look(self, method: Method, network: Backbone, loader: Any, split: str) -> Samples:
        # Features, classes and indices of all ranks, in order of index. A rank may have no sample at all.
        loader = draw_at_most(self.max_samples, loader, self.seed)
        seen: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
        for batch in track(loader, f"usable information: {split}", total=len(loader)):
            if len(batch.target):
                batch = method.transfer_batch_to_device(batch, method.device, 0)
                batch = method.trainer.precision_plugin.convert_input(batch)
                found = group_features(network, batch.input, self.groups)
                seen.append(({name: rows.float() for name, rows in found.items()}, batch.target, batch.index))
        return _gather(seen, list(self.groups or network.groups), method.device)

    def _measure(self, data: ImageDataModule, samples: list[Samples], epoch: int) -> list[dict[str, Any]]:
        # On the first rank, whose numbers all take over: elsewhere rounding might differ.
        index = torch.cat([part[2] for part in samples])
        parts = self._parts([len(part[2]) for part in samples])
        reducer, rows = current_reducer(), []
        codes = self.variables.codes(torch.cat([part[1] for part in samples]), index, data.num_classes)
        for group in samples[0][0]:
            features = torch.cat([part[0][group] for part in samples])
            for variable, (label, number) in codes.items():
                for decoder in self.decoders:
                    values = torch.zeros(len(_FIGURES), dtype=torch.float64, device=features.device)
                    if reducer.rank == 0:
                        options: dict[str, Any] = {"decoder": decoder, "classes": number, "seed": self.seed}
                        result = usable_information(features.cpu(), label, parts, **options)
                        values += torch.tensor([getattr(result, name) for name in _FIGURES]).to(values)
                    figures = dict(zip(_FIGURES, reducer.broadcast_(values).tolist(), strict=True))
                    rows.append({"epoch": epoch, "group": group, "variable": variable, "decoder": decoder, **figures})
        return rows

    def _parts(self, sizes: list[int]) -> Parts:
        if self.report_on == "train":
            return draw_parts(sizes[0], seed=self.seed)
        order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(self.seed)) + sizes[0]
        half = sizes[1] // 2
        return torch.arange(sizes[0]), order[:half].sort().values, order[half:].sort().values

    def state_dict(self) -> dict[str, Any]:
        """Keep the table.

        Returns:
            Its rows.
        """
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the table of the interrupted run."""
        self.rows = list(state_dict["rows"])


def _gather(seen: list[Any], groups: list[str], device: torch.device) -> Samples:
    reducer = current_reducer()
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    label, index = (torch.cat([empty, *(part[place] for part in seen)]) for place in (1, 2))
    # A rank without samples learns from the others how wide the features are.
    widths = torch.zeros(len(groups), dtype=torch.int64, device=device)
    own = torch.tensor([seen[0][0][group].shape[1] for group in groups], device=device) if seen else widths
    widths = reducer.gather_rows(own.unsqueeze(0), torch.tensor([reducer.rank], device=device))[0].amax(0)
    gathered = {}
    for group, width in zip(groups, widths.tolist(), strict=True):
        rows = [torch.zeros(0, width, device=device), *(part[0][group] for part in seen)]
        gathered[group] = reducer.gather_rows(torch.cat(rows), index)[0]
    classes, order = reducer.gather_rows(label, index)
    return gathered, classes.cpu(), order.cpu()


def _data_and_method(trainer: Trainer, module: LightningModule) -> tuple[ImageDataModule, Method]:
    # Lightning sets `datamodule` at run time and does not declare it.
    return cast(ImageDataModule, trainer.datamodule), cast(Method, module)  # type: ignore[attr-defined]


def _validates(trainer: Trainer) -> bool:
    return bool(len(cast(Any, trainer).datamodule.val_dataloader()) and trainer.limit_val_batches)


def _wrong(name: str, value: object, expected: str, usual: object) -> str:
    return (
        f"`{name}` of the usable information is {value}, expected {expected}. "
        f"Set callbacks.usable_information.{name}={usual}"
    )
