"""`lqf-train`: fine-tune a network on images, track the run, test it."""

import logging
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lqf_lightning._instantiate import instantiate, instantiate_all
from lqf_lightning._launch import in_sweep, is_many_processes, one_job, run_in_own_process
from lqf_lightning._plugins import register_plugins
from lqf_lightning.backbones import Backbone
from lqf_lightning.data import ImageDataModule
from lqf_lightning.methods import Method
from lqf_lightning.references import open_references
from lqf_lightning.resume import checkpoint_to_resume, keep_indices, make_paths_absolute
from lqf_lightning.run_folder import forget_results, read_metrics, write_metrics, write_start
from lqf_lightning.sample_files import keep_sample_files, refuse_changed_files
from lqf_lightning.starting_head import forget_head, give_head, resumed_head
from lqf_lightning.summary import keep_outlook, print_summary
from lqf_lightning.sync_batch_norm import TimmSyncBatchNorm
from lqf_lightning.weights_origin import note_seen_labels, refuse_slope_of_run, warn_of_seen_images

_MODULE = "lqf_lightning.train"
_BACKBONE = "lqf_lightning.backbones.create_backbone"


def train(config: DictConfig) -> dict[str, float]:
    """Run one job: data, network, method, training, test.

    Args:
        config: The composed configuration (see ``conf/train.yaml``).

    Returns:
        The final metrics, as in ``metrics.json``.
    """
    folder = Path(config.paths.output_dir)
    make_paths_absolute(config)
    resumed = checkpoint_to_resume(config, folder)
    asked = {"head": config.head} if "head" in config else {}  # by which runs are compared, not by the file it is in
    # A used folder is what resuming and starting over are about.
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    if resumed:
        refuse_changed_files(config, folder)
        keep_indices(config, folder)
        resumed_head(config, resumed.absolute().parent.parent)
    else:
        forget_results(folder)
        forget_head(folder)
    known = read_metrics(folder)
    data, method = build_method(config)
    write_start(folder, config)
    keep_sample_files(config, folder)
    rank_zero_only(data.manifest.write)(folder / "manifest.parquet")
    trainer = build_trainer(config, folder, data.classes)
    options = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)) | asked
    for logger in trainer.loggers:
        logger.log_hyperparams(options)

    started = time.monotonic()
    trainer.fit(method, datamodule=data, ckpt_path=resumed, weights_only=True)
    keep_outlook(folder, method)
    spent = known.get("time/fit_s", 0.0) + time.monotonic() - started
    metrics: dict[str, Any] = {**known, **trainer.callback_metrics, "time/fit_s": spent}
    write_metrics(folder, metrics)
    if config.test:
        best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
        if getattr(method, "sweeps", 0):
            best = None  # an exact solver is tested at the optimum that its certificate is of, not at an earlier point
        trainer.test(method, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)
        metrics |= trainer.callback_metrics
        write_metrics(folder, metrics)
    return {name: float(value) for name, value in metrics.items()}


def build_method(config: DictConfig) -> tuple[ImageDataModule, Method]:
    """The data and the method of a configuration, checked against one another.

    Args:
        config: The composed configuration; a head that is fitted is kept, and `head` becomes the name of its file.

    Returns:
        The data module, set up, and the method around its backbone.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    data: ImageDataModule = instantiate(config, "data")
    data.prepare_data()
    data.setup()
    weights = OmegaConf.select(config, "backbone.weights")
    refuse_slope_of_run(weights, config.backbone.get("leaky_slope"))
    warn_of_seen_images(weights, data)
    ours = config.backbone.get("_target_") == _BACKBONE  # others need not know which head belongs to which classes
    known = {"classes": data.classes} if ours else {}
    backbone: Backbone = instantiate(config, "backbone", num_classes=data.num_classes, **known)
    data.normalization = (backbone.mean, backbone.std)
    note_seen_labels(weights, give_head(config, backbone, data), data)
    opened = open_references(config, "method", data.classes)
    method: Method = instantiate(config, "method", backbone=backbone, classes=data.classes, **opened)
    return data, method


def build_trainer(config: DictConfig, folder: Path, classes: Sequence[str] = ()) -> Trainer:
    """The Lightning Trainer of a configuration, with its loggers and callbacks.

    Args:
        config: The composed configuration.
        folder: The run folder.
        classes: Class names of the data, for models to compare with.

    Returns:
        The trainer. Checkpointing and progress come from their own config groups, observers from `callbacks`.

    Raises:
        MisconfigurationException: This machine cannot run it.
        ValueError: An option of Lightning's would break the order of samples.
    """
    chosen = [f"callbacks.{name}" for name, entry in (config.get("callbacks") or {}).items() if entry is not None]
    callbacks: list[Callback] = [instantiate(config, key, **open_references(config, key, classes)) for key in chosen]
    callbacks += instantiate_all(config, "checkpoints")
    if config.get("progress"):
        callbacks.append(instantiate(config, "progress"))
    settings: dict[str, Any] = {
        "logger": instantiate_all(config, "logger"),
        "callbacks": callbacks,
        "default_root_dir": folder,
        "use_distributed_sampler": False,  # ours shard without padding the evaluation
        "num_sanity_val_steps": 0,
        "enable_checkpointing": bool(config.get("checkpoints")),
        "enable_progress_bar": bool(config.get("progress")),
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    if config.trainer.get("sync_batchnorm"):
        settings["plugins"] = [TimmSyncBatchNorm()]
        config = cast(DictConfig, OmegaConf.merge(config, {"trainer": {"sync_batchnorm": False}}))
    if config.trainer.get("overfit_batches"):
        raise ValueError(
            "trainer.overfit_batches replaces samplers that know epochs and ranks. Set +trainer.limit_train_batches=2 "
            "with data.shots=5 to see whether a few images can be learned"
        )
    settings = {name: value for name, value in settings.items() if name not in config.trainer}
    try:
        trainer: Trainer = instantiate(config, "trainer", **settings)
    except MisconfigurationException as error:
        asked = {name: config.trainer.get(name, "auto") for name in ("accelerator", "devices", "strategy")}
        raise MisconfigurationException(f"trainer: {error} Got {asked}; without a GPU, set trainer=cpu.") from error
    return trainer


def score(metrics: dict[str, float], objective: str) -> float:
    """The number that a hyper-parameter sweep optimizes.

    Args:
        metrics: The final metrics.
        objective: Name of one of them.

    Returns:
        Its value.

    Raises:
        ValueError: The run reported no such metric, or it is not a number.
    """
    value = metrics.get(objective, math.nan)
    if math.isnan(value):
        raise ValueError(f"`objective={objective}` was not reported as a number. Choose one of {sorted(metrics)}.")
    return value


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="train")
def _run(config: DictConfig) -> float:
    if in_sweep() and is_many_processes(config.trainer.get("devices", "auto"), config.trainer.get("num_nodes", 1)):
        return score(run_in_own_process(_MODULE), config.objective)
    with one_job(_MODULE):
        metrics = train(config)
    print_summary(Path(config.paths.output_dir), metrics, config)  # after W&B's own last words
    # A single run has nothing to optimize, and may have nothing to validate on.
    return score(metrics, config.objective) if in_sweep() else metrics.get(config.objective, math.nan)


def prepare_process() -> None:
    """What every command does first: find plug-ins, and keep upstream chatter off the terminal."""
    register_plugins()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # Lightning 2.6 on torch 2.15 and timm on torch 2.13 announce deprecations that users can do nothing about.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated.*")
    # Frozen parts are in eval mode on purpose, and images in memory need no workers.
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def main() -> None:
    """Entry point of ``lqf-train``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
