"""`lqf-predict`: how many steps and seconds a training would take, without training."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, cast, get_args

import hydra
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table

from lqf_lightning._instantiate import instantiate
from lqf_lightning._launch import in_sweep, is_many_processes, one_job, run_in_own_process
from lqf_lightning.analysis.predictable import left_out, refuse_unpredictable, tell_what_is_not_modeled
from lqf_lightning.analysis.training_forecast import ForecastKernel, forecast_training
from lqf_lightning.analysis.training_time_picture import draw_training_time
from lqf_lightning.analysis.training_time_report import threshold_rows, write_report
from lqf_lightning.linear.training_time import extrapolated_times, refuse_fractions, training_times
from lqf_lightning.methods import Method
from lqf_lightning.methods.solvers.training_table import on_device
from lqf_lightning.resume import make_paths_absolute
from lqf_lightning.run_folder import write_metrics, write_start
from lqf_lightning.train import build_method, build_trainer, prepare_process

log = logging.getLogger(__name__)
_MODULE = "lqf_lightning.predict"
_TIMED = 4  # steps, of which the first warms up


def predict(config: DictConfig) -> dict[str, Any]:
    """Foretell the training that a configuration describes.

    Args:
        config: The composed configuration (see ``conf/predict.yaml``).

    Returns:
        The report, as written to ``training_time.json``.

    Raises:
        ValueError: The kernel has another name.
    """
    refuse_fractions(config.thresholds)
    if config.kernel not in get_args(ForecastKernel):
        raise ValueError(f"`kernel` must be one of {get_args(ForecastKernel)}, got {config.kernel!r}. Set kernel=auto")
    make_paths_absolute(config)
    folder = Path(config.paths.output_dir)
    samples, epoch = _shorten(config)
    data, method = build_method(config)
    write_start(folder, config)
    trainer = build_trainer(config, folder, data.classes)
    forecaster = Forecaster(config, samples, epoch, folder)
    cast(Any, trainer).callbacks.append(forecaster)  # Lightning does not declare them
    trainer.fit(method, datamodule=data)
    if forecaster.report:
        return forecaster.report
    # Processes that have ended by now found it out.
    report: dict[str, Any] = json.loads((folder / "training_time.json").read_text())
    return report | {"final_loss": math.nan if report["final_loss"] is None else report["final_loss"]}


class Forecaster(Callback):
    """Predicts a training that is about to begin, and stops it before its first step.

    Args:
        config: The composed configuration.
        samples: Number of training samples, of which the data module may have a part.
        epoch: Steps of an epoch over all of them; None: as the trainer has them.
        folder: The run folder, for ``training_time.json`` and its picture.

    Attributes:
        report: Steps, epochs and seconds to every threshold, from the start of training on.
        losses: Predicted loss of the batch of every step (T,).
    """

    def __init__(self, config: DictConfig, samples: int, epoch: int | None, folder: Path) -> None:
        self.config, self.samples, self.epoch, self.folder = config, samples, epoch, folder
        self.report: dict[str, Any] = {}
        self.losses = torch.zeros(0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be predicted."""
        refuse_unpredictable(cast(Method, pl_module), trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict, and stop."""
        method, options = cast(Method, pl_module), self.config
        tell_what_is_not_modeled(method, trainer)
        forecast = forecast_training(
            method, form=options.kernel, largest=options.largest, memory_gib=options.memory_gib
        )
        started = time.monotonic()
        curve, fractions = forecast.curve(), list(options.thresholds)
        self.losses, initial = curve.batch_loss.cpu(), float(curve.loss[0])
        epoch = self.epoch or forecast.epoch
        if len(forecast.initial) < self.samples:
            half = forecast.half().curve()
            starts = (initial, float(half.loss[0]))
            times = extrapolated_times(self.losses, half.batch_loss.cpu(), fractions, window=epoch, initial=starts)
        else:
            times = training_times(self.losses, fractions, window=epoch, initial=initial)
        spent = {"kernel": forecast.seconds, "prediction": time.monotonic() - started}
        per_step = seconds_per_step(method)
        self.report = {
            "method": type(method).__name__, "samples": self.samples, "used_samples": len(forecast.initial),
            "steps": forecast.rule.steps, "steps_per_epoch": epoch, "kernel": forecast.kernel.form,
            "effective_time": forecast.rule.time, "initial_loss": initial, "final_loss": float(curve.loss[-1]),
            "final_error": float(curve.error[-1]), "thresholds": threshold_rows(times, initial, epoch, per_step),
            "seconds": spent | {"per_step": per_step}, "left_out": left_out(method, trainer),
        }  # fmt: skip
        if not math.isfinite(self.report["final_loss"]):
            log.warning("training is predicted to diverge. Set method.optimizer.lr lower")
        if trainer.is_global_zero:
            self._write()
        trainer.should_stop = True

    def _write(self) -> None:
        write_report(self.folder / "training_time.json", self.report)
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        rows, title = self.report["thresholds"], "predicted by a linear model"
        picture = draw_training_time(self.losses, rows, self.report["steps_per_epoch"], None, title)
        picture.savefig(self.folder / "pictures" / "training_time.png", dpi=120)


def seconds_per_step(method: Method) -> float:
    """Time forward and backward passes on training batches; no step is taken.

    Args:
        method: The method, attached to a trainer whose training is over before it began.

    Returns:
        The median over a few batches, of this process, without optimizer and communication.
    """
    spent = []
    method.train()
    batches = [on_device(cast(Any, method), batch) for _, batch in zip(range(_TIMED), _repeated(method), strict=False)]
    for batch in batches:
        started = time.monotonic()
        loss = method.training_loss(method(batch.input), batch) + method.penalty()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        if method.device.type == "cuda":
            torch.cuda.synchronize()
        method.zero_grad()
        spent.append(time.monotonic() - started)
    return sorted(spent[1:])[len(spent[1:]) // 2]


def _repeated(method: Method) -> Any:
    while True:
        yield from cast(Any, method.trainer.train_dataloader)


def _shorten(config: DictConfig) -> tuple[int, int | None]:
    # A subset takes as many steps as all samples would. The trainer does nothing but start.
    with open_dict(config):
        config.callbacks, config.logger, config.checkpoints = None, None, None
    data = instantiate(config, "data")
    data.prepare_data()
    data.setup()
    data.normalization = ((0.5,) * 3, (0.5,) * 3)  # only samples are counted
    samples, wanted = len(data.fixed_train_dataloader().dataset), config.max_samples
    if wanted is None or wanted >= samples:
        return samples, None
    if wanted < 2:
        raise ValueError(f"`max_samples` must be null (all) or at least 2, got {wanted}. Set max_samples=200")
    for name in ("subset", "shots"):
        if (chosen := config.data.get(name)) is not None:
            raise ValueError(
                f"max_samples={wanted} draws training images, and data.{name}={chosen} chooses them. Set "
                f"max_samples=null, or data.{name}=null"
            )
    if (limit := config.trainer.get("limit_train_batches")) not in (None, 1.0):
        raise ValueError(
            f"a subset takes whole epochs, got max_samples={wanted} and trainer.limit_train_batches={limit}. Set "
            "max_samples=null, or trainer.limit_train_batches=1.0"
        )
    epochs, most = config.trainer.get("max_epochs"), config.trainer.get("max_steps") or -1
    size = data.batch_size
    epoch = max(1, samples // size if data.drop_last else math.ceil(samples / size))
    if epochs is None or epochs < 0:
        if most < 0:
            raise ValueError("a training without an end cannot be predicted. Set trainer.max_epochs=10")
        steps = most
    else:
        steps = epochs * epoch if most < 0 else min(most, epochs * epoch)
    with open_dict(config):
        config.data.subset_ratio = config.data.get("subset_ratio", 1.0) * wanted / samples
        config.data.drop_last = False
        config.trainer.max_epochs, config.trainer.max_steps = -1, steps
    return samples, epoch


@rank_zero_only
def print_prediction(report: dict[str, Any], folder: Path) -> None:
    """Print steps, epochs and seconds to every threshold.

    Args:
        report: As of `predict`.
        folder: Where it has been written.
    """
    used = f"{report['used_samples']} of {report['samples']}" if report["used_samples"] < report["samples"] else "all"
    table = Table(title=f"{report['method']}, {report['steps']} steps, told by {used} training samples")
    for column in ("loss", "of initial", "steps", "epochs", "seconds"):
        table.add_column(column, justify="right")
    for row in report["thresholds"]:
        sign = "≥ " if row["lower_bound"] else ""
        if row["predicted_steps"] is None:
            cells = [f"> {report['steps']}", "", ""]
        else:
            cells = [
                f"{sign}{row['predicted_steps']}",
                f"{row['predicted_epochs']:.1f}",
                f"{row['predicted_seconds']:.1f}",
            ]
        table.add_row(f"{row['loss']:.4g}", f"{row['fraction']:g}", *cells)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    console.print(f"{folder / 'training_time.json'}\n{folder / 'pictures' / 'training_time.png'}", soft_wrap=True)


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="predict")
def _run(config: DictConfig) -> None:
    if in_sweep() and is_many_processes(config.trainer.get("devices", "auto"), config.trainer.get("num_nodes", 1)):
        run_in_own_process(_MODULE)
        return
    with one_job(_MODULE):
        report = predict(config)
    write_metrics(Path(config.paths.output_dir), {"train/predicted_loss": report["final_loss"]})
    print_prediction(report, Path(config.paths.output_dir))


def main() -> None:
    """Entry point of ``lqf-predict``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
