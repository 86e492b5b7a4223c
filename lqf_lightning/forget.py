"""`lqf-forget`: take training samples out of a finished run's model, prove it, report it, and delete what is left."""

import copy
import logging
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lqf_lightning._launch import in_sweep, is_many_processes, one_job, run_in_own_process
from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.analysis.scrubs_model import ScrubsModel
from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.changed_data import refuse_changed_data
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.deletion.complete import Request, finish
from lqf_lightning.deletion.journal import Journal
from lqf_lightning.finished_run import open_run, steps_taken
from lqf_lightning.methods import LQF, Method, MixedPrivacy
from lqf_lightning.resume import run_config
from lqf_lightning.train import build_trainer, prepare_process

log = logging.getLogger(__name__)
_MODULE = "lqf_lightning.forget"


def forget(config: DictConfig) -> Path:
    """Answer a request to forget training samples, or finish one that was interrupted while it deleted.

    Args:
        config: The composed configuration (see ``conf/forget.yaml``).

    Returns:
        The folder of the new model.
    """
    if config.finish is not None:
        removed = finish(Path(config.finish).absolute())
        log.info("purged: %d files deleted, %d filtered", len(removed.deleted), len(removed.filtered))
        return Path(config.finish)
    _refuse_missing(config)
    checkpoint, folder = Path(config.checkpoint).absolute(), Path(config.paths.output_dir).absolute()
    previous = _recorded(checkpoint)
    Journal.refuse_folders(folder, checkpoint.parent.parent)
    cohort = _find(config.cohort, previous, whole=_may_forget_all(checkpoint))
    _keep_secret(config)
    run, data, method = open_run(config, checkpoint, folder)
    _refuse_changes(folder, previous, data, cohort)
    gone = int(data.manifest.table.loc[cohort.indices.tolist(), "removed"].sum())
    if gone and not _means_all(cohort, previous):  # the run is opened without them: nothing is drawn in their place
        log.warning("%d of %d files are gone: the model cannot be asked about the samples", gone, len(cohort))
        run, data, method = _open_without(config, checkpoint, folder, previous.forget(cohort.indices.numpy()))
    request = Request(checkpoint, folder, run, cohort, previous, data, method, gone)
    trainer = build_trainer(run, folder, data.classes)
    scrub = _scrub_of(trainer)
    scrub.chosen, scrub.steps = cohort, steps_taken(checkpoint)
    scrub.start = None if isinstance(method, LQF) else copy.deepcopy(method.backbone)
    scrub.kernel = _kernel(checkpoint.parent.parent, run, previous)
    if trainer.is_global_zero:
        scrub.complete = partial(request.complete, journal=request.begin(), purge=config.purge)
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")  # none of them is needed
    check = trainer.validate if len(data.val_dataloader()) else trainer.test
    check(method, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    return folder


def _means_all(cohort: Cohort, previous: Manifest) -> bool:
    return bool(previous.rows("train")["index"].isin(cohort.indices.tolist()).all())


def _open_without(
    config: DictConfig, checkpoint: Path, folder: Path, left: Manifest
) -> tuple[DictConfig, ImageDataModule, Method]:
    with tempfile.TemporaryDirectory() as place:
        left.write(Path(place) / "manifest.parquet")
        return open_run(config, checkpoint, folder, manifest=Path(place) / "manifest.parquet")


def _refuse_missing(config: DictConfig) -> None:
    if config.checkpoint is None or config.cohort is None:
        raise ValueError(
            f"got checkpoint={config.checkpoint} and cohort={config.cohort}, expected both. Set "
            "checkpoint=RUN/checkpoints/last.ckpt cohort={fraction: 0.01}"
        )


def _recorded(checkpoint: Path) -> Manifest:
    written = checkpoint.parent.parent / "manifest.parquet"
    if checkpoint.is_file() and not written.is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no recorded training set: {written} is missing, so nobody can tell what is to be "
            "forgotten, or what is left. Give a checkpoint inside the folder that lqf-train wrote"
        )
    return Manifest.read(written)


def _find(wanted: Any, previous: Manifest, *, whole: bool) -> Cohort:
    spec = OmegaConf.to_container(wanted, resolve=True) if OmegaConf.is_config(wanted) else wanted
    core = torch.from_numpy(previous.table.loc[previous.table["core"] != "", "index"].to_numpy(copy=True))
    with tempfile.TemporaryDirectory(prefix="cohort_") as place:  # an artifact is read, and kept nowhere
        if isinstance(spec, dict) and set(spec) == {"artifact"}:
            spec = _download(str(spec["artifact"]), Path(place))
        return Cohort.parse(spec, previous, core=core, whole=whole)


def _may_forget_all(checkpoint: Path) -> bool:
    target = str(OmegaConf.select(run_config(checkpoint), "method._target_"))
    found = hydra.utils.get_object(target)
    return isinstance(found, type) and issubclass(found, MixedPrivacy)


def _keep_secret(config: DictConfig) -> None:
    # The request is no part of the new run, and goes neither into its files nor to Weights & Biases, whose runs keep
    # the command line as their name and among their facts, and what is printed, the receipt included.
    config.callbacks = OmegaConf.to_container(config.callbacks, resolve=True)
    if config.callbacks.get("scrub"):
        config.callbacks.scrub.cohort = None
    for logger in (config.get("logger") or {}).values():
        if str(logger.get("_target_")).endswith("wandb_logger"):
            logger.name = logger.get("name") or Path(config.paths.output_dir).name
            os.environ |= {"WANDB_CONSOLE": "off", "WANDB_X_DISABLE_META": "true"}


def _refuse_changes(folder: Path, previous: Manifest, data: ImageDataModule, cohort: Cohort) -> None:
    if not (len(data.manifest.rows("val")) or len(data.manifest.rows("test"))):
        _leave_nothing(folder)
        raise ValueError(
            "the run has neither validation nor test images, which a request is judged by. Add a folder `test` to the "
            "data set, with the classes of the run: lqf-forget numbers its images after all others"
        )
    try:
        refuse_changed_data(previous, data.manifest, cohort.indices)
    except ValueError:
        _leave_nothing(folder)
        raise


@rank_zero_only
def _leave_nothing(folder: Path) -> None:
    for name in ("config.yaml", "environment.json", "manifest.parquet"):  # they list the samples
        (folder / name).unlink(missing_ok=True)


def _download(name: str, folder: Path) -> str:
    import wandb  # takes a second, and most requests need no artifact

    try:
        wandb.Api().artifact(name).download(root=str(folder))
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
        raise ValueError(
            f"cohort={{artifact: {name}}} could not be fetched from Weights & Biases: {error}. Log in with `wandb "
            "login`, or give the file itself: cohort=request.csv"
        ) from error
    files = [path for path in folder.rglob("*") if path.suffix in (".parquet", ".csv", ".json", ".txt")]
    if len(files) != 1:
        raise ValueError(
            f"the artifact {name} holds {len(files)} files of samples, expected one Parquet, CSV, JSON or text file"
        )
    return str(files[0])


def _scrub_of(trainer: Any) -> ScrubsModel:
    found = [callback for callback in trainer.callbacks if isinstance(callback, ScrubsModel)]
    if len(found) != 1:
        raise ValueError(f"expected one callback `scrub`, got {len(found)}. Set callbacks=[scrub]")
    return found[0]


def _kernel(folder: Path, run: DictConfig, manifest: Manifest) -> KeptKernel | None:
    kept = KeptKernel.read(folder)
    parts = OmegaConf.select(run, "method.kernel_folder")
    if kept is not None or parts is None:
        return kept
    index = torch.from_numpy(manifest.rows("train")["index"].to_numpy(copy=True))
    return KeptKernel.from_parts(parts, index)


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="forget")
def _run(config: DictConfig) -> None:
    if in_sweep() and is_many_processes(config.trainer.get("devices", "auto"), config.trainer.get("num_nodes", 1)):
        run_in_own_process(_MODULE)
        return
    with one_job(_MODULE):
        folder = forget(config)
    log.info("the model that forgot, its certificate and its report are in %s", folder)


def main() -> None:
    """Entry point of ``lqf-forget``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
