"""`lqf-curate`: a smaller, a weighted or a larger training set for the next run, from a finished one."""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import hydra
import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf, open_dict

from lqf_lightning._launch import in_sweep, is_many_processes, one_job, run_in_own_process
from lqf_lightning.analysis import problem_of_run
from lqf_lightning.analysis.curation import Curation, Request, Task, curate_problem
from lqf_lightning.analysis.curation_picture import draw_curation, ends_of
from lqf_lightning.backbones import Backbone
from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.thumbnails import load_thumbnails
from lqf_lightning.finished_run import open_run
from lqf_lightning.methods import Method
from lqf_lightning.run_folder import write_json
from lqf_lightning.train import build_trainer, prepare_process

log = logging.getLogger(__name__)
_MODULE = "lqf_lightning.curate"


class Curator(Callback):
    """Curates the training set of a finished run once its checkpoint is loaded, in the processes that opened it.

    Args:
        request: What to do.
        start: The network before training.
        options: Of `problem_of_run`.
        used: For "extend", indices of the samples that the run was trained on (k,).
        note: What the report says beside the results.

    Attributes:
        done: Whether it has.
        report: What was found, in the processes that have looked.
    """

    def __init__(
        self,
        request: Request,
        start: Backbone,
        options: dict[str, Any],
        used: torch.Tensor | None,
        note: dict[str, Any],
    ) -> None:
        self.request, self.start, self.options, self.used, self.note = request, start, options, used, note
        self.done = False
        self.report: dict[str, Any] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Curate."""
        self._curate(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Curate a run without validation images."""
        self._curate(trainer, pl_module)

    def _curate(self, trainer: Trainer, method: LightningModule) -> None:
        if self.done:
            return
        self.done = True
        data: ImageDataModule = cast(Any, trainer).datamodule
        problem = problem_of_run(cast(Method, method), start=self.start, **self.options)
        core = None if self.used is None else torch.isin(problem.table.index, self.used.to(problem.table.index))
        found = curate_problem(problem, data.manifest, self.request, core)
        found.report["request"] = self.note
        self.report = found.report
        if trainer.is_global_zero:
            write_curation(found, Path(trainer.default_root_dir), data)


def curate(config: DictConfig) -> dict[str, Any]:
    """Curate the training set of a checkpoint's run.

    Args:
        config: The composed configuration (see ``conf/curate.yaml``).

    Returns:
        The report, as written to ``curation.json`` of the new folder, beside ``subset.parquet`` or
        ``weights.parquet``, which `data.subset` and `data.weights` take as they are.

    Raises:
        ValueError: An option is out of range, the run has neither validation nor test images, or lacks those that the
            task goes by.
    """
    asked = _asked(config)
    request = Request(**{**asked, "baselines": tuple(asked["baselines"])})
    checkpoint, folder = Path(config.checkpoint).absolute(), Path(config.paths.output_dir)
    extends = request.task == "extend"
    with open_dict(config):  # the pool is what the run was told to leave out
        everything = {"subset": None, "shots": None, "subset_ratio": 1.0} if extends else {}
        config.data = OmegaConf.merge(config.data, everything)
    run, data, method = open_run(config, checkpoint, folder)
    validates = len(data.val_dataloader()) > 0
    if not validates and not len(data.test_dataloader()):
        raise ValueError(
            "a checkpoint is opened on evaluation images, and the run has none. Add a folder val or test to "
            "data.source.root, or train the run anew with data.val_fraction=0.1"
        )
    used = _used(checkpoint) if extends else None
    refuse_sources(request, validates, data.manifest, used)
    trainer = build_trainer(run, folder, data.classes)
    options = {"form": config.kernel, "memory_gib": config.memory_gib}
    note = {"checkpoint": str(checkpoint), **asked}
    curator = Curator(request, copy.deepcopy(method.backbone), options, used, note)
    cast(Any, trainer).callbacks.append(curator)  # Lightning does not declare them
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")  # none of them is needed
    check = trainer.validate if validates else trainer.test
    check(method, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    if curator.report:  # a file that the first process writes may not be there yet
        return curator.report
    report: dict[str, Any] = json.loads((folder / "curation.json").read_text())  # of processes that have ended
    return report


def refuse_sources(request: Request, validates: bool, manifest: Manifest, used: torch.Tensor | None) -> None:
    """Check that a run has the samples that a task goes by, before anything is computed.

    Args:
        request: What to do.
        validates: Whether there are validation images.
        manifest: All samples that take part.
        used: For "extend", indices of the samples that the run was trained on (k,).

    Raises:
        ValueError: There are no validation images, or there is no pool.
    """
    if request.task != "summarize" and request.by == "validation" and not validates:
        raise ValueError(
            "there are no validation samples to go by. Set by=leave_one_out, or train the run anew with "
            "data.val_fraction=0.1"
        )
    samples = len(manifest.rows("train"))
    if used is not None and len(used) == samples:
        raise ValueError(
            f"there is no pool: the run trains on {samples} of {samples} samples. Extend a run with data.subset, "
            "data.shots or data.subset_ratio below 1"
        )


def write_curation(found: Curation, folder: Path, data: ImageDataModule) -> None:
    """Write tables, report and picture.

    Args:
        found: What a task has found.
        folder: The run folder.
        data: The data, for pictures of samples.
    """
    for name, table in found.tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
    found.samples.to_parquet(folder / "samples.parquet", index=False)
    write_json(folder / "curation.json", found.report)
    images = [load_thumbnails(data, "train", rows["index"].tolist()) for rows in ends_of(found)]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    draw_curation(found, *images).savefig(folder / "pictures" / "curation.png", dpi=120)
    for name in ("subset", "weights"):
        if name in found.tables:
            log.info("train on it with data.%s=%s", name, folder / f"{name}.parquet")


def _asked(config: DictConfig) -> dict[str, Any]:
    asked = {name: config[name] for name in ("task", "by", "loss", "seed")}
    for task in get_args(Task):
        asked |= cast(dict[str, Any], OmegaConf.to_container(config[task], resolve=True))
    return asked


def _used(checkpoint: Path) -> torch.Tensor:
    rows = Manifest.read(checkpoint.parent.parent / "manifest.parquet").rows("train")
    return torch.tensor(rows["index"].tolist())


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="curate")
def _run(config: DictConfig) -> None:
    if in_sweep() and is_many_processes(config.trainer.get("devices", "auto"), config.trainer.get("num_nodes", 1)):
        run_in_own_process(_MODULE)
        return
    with one_job(_MODULE):
        curate(config)
    log.info("results in %s", config.paths.output_dir)


def main() -> None:
    """Entry point of ``lqf-curate``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
