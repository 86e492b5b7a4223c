"""`lqf-forget`: take training samples out of a finished run's model, prove it, report it, and delete what is left."""

import copy
import logging
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from lqf_lightning._launch import in_sweep, is_many_processes, one_job, run_in_own_process
from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.analysis.scrubs_model import ScrubsModel
from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.changed_data import refuse_changed_data
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.deletion.complete import Request
from lqf_lightning.deletion.journal import finish_request
from lqf_lightning.finished_run import open_run, steps_taken
from lqf_lightning.methods import LQF, Method, MixedPrivacy
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
        removed = finish_request(Path(config.finish).absolute())
        log.info("purged: %d files deleted, %d filtered", len(removed.deleted), len(removed.filtered))
        return Path(config.finish)
    _refuse_missing(config)
    checkpoint, folder = Path(config.checkpoint).absolute(), Path(config.paths.output_dir).absolute()
    previous = _recorded(checkpoint)
    spec = _plain_spec(config.cohort)
    config.callbacks = OmegaConf.to_container(config.callbacks, resolve=True)  # the request is no part of the run
    run, data, method = open_run(config, checkpoint, folder)
    core = previous.table.loc[previous.table["core"] != "", "index"].to_numpy(copy=True)
    cohort = Cohort.parse(spec, previous, core=torch.from_numpy(core), whole=isinstance(method, MixedPrivacy))
    refuse_changed_data(previous, data.manifest, cohort.indices)
    gone = int(data.manifest.table.loc[cohort.indices.tolist(), "removed"].sum())
    if gone:  # so that nothing is drawn in their place, the run is opened without the samples
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


def _plain_spec(cohort: Any) -> Any:
    spec = OmegaConf.to_container(cohort, resolve=True) if OmegaConf.is_config(cohort) else cohort
    return _download(str(spec["artifact"])) if isinstance(spec, dict) and set(spec) == {"artifact"} else spec


def _download(name: str) -> str:
    import wandb  # takes a second, and most requests need no artifact

    folder = Path(tempfile.mkdtemp(prefix="cohort_"))
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
