"""`lqf-eval`: the metrics of a checkpoint, on the data of its run or on other data."""

import logging
import warnings
from pathlib import Path

import hydra
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from lqf_lightning._launch import in_sweep, is_many_processes, one_job, run_in_own_process
from lqf_lightning.resume import keep_indices, make_paths_absolute, run_config
from lqf_lightning.run_folder import write_metrics, write_start
from lqf_lightning.train import build_method, build_trainer, prepare_process

log = logging.getLogger(__name__)
_MODULE = "lqf_lightning.evaluate"


def evaluate(config: DictConfig) -> dict[str, float]:
    """Load a checkpoint, rebuild what its run folder describes, and test it.

    Args:
        config: The composed configuration (see ``conf/eval.yaml``).

    Returns:
        The metrics, as written to ``metrics.json`` of the new folder.

    Raises:
        ValueError: `split` is neither "val" nor "test", or the data have no such samples.
    """
    if config.split not in ("val", "test"):
        raise ValueError(f"`split` must be 'val' or 'test', got {config.split!r}. Set split=test")
    checkpoint = Path(config.checkpoint).absolute()
    run = run_config(checkpoint)
    with open_dict(run):
        other = "_target_" in config.data
        run.data = config.data if other else OmegaConf.merge(run.data, config.data)
        run.trainer, run.logger, run.progress = config.trainer, config.get("logger"), config.get("progress")
        run.callbacks, run.checkpoints, run.paths = config.get("callbacks"), None, config.paths
        run.backbone.weights = None  # the checkpoint holds them
        run.reference = config.get("reference")
        for key in {"subset", "weights"} & set(run.data):
            run.data[key] = None  # they concern training images, and their files may be gone
        if "core" in run.data:
            run.data.core, run.data.part = None, "all"
        if "reference" in run.method:
            run.method.reference = None  # what the model learned from is not needed any more
    if not other and "source" not in config.data:
        run.data.manifest = None  # that of the run, wherever its folder has been moved since
        keep_indices(run, checkpoint.parent.parent)
    make_paths_absolute(run)
    log.info("evaluating %s on its %s set", checkpoint, config.split)
    data, method = build_method(run)
    _refuse_other_classes(checkpoint, data.classes)
    folder = Path(config.paths.output_dir)
    write_start(folder, run)
    rank_zero_only(data.manifest.write)(folder / "manifest.parquet")
    if not len(data.test_dataloader() if config.split == "test" else data.val_dataloader()):
        raise ValueError(f"the data have no {config.split} samples. Set split=test, or +data.val_fraction=0.1")
    trainer = build_trainer(run, folder, data.classes)
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")  # none of them is needed
    check = trainer.test if config.split == "test" else trainer.validate
    check(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    write_metrics(folder, trainer.callback_metrics)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _refuse_other_classes(checkpoint: Path, classes: list[str]) -> None:
    known = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]["classes"]
    if list(known) != classes:
        raise ValueError(
            f"{checkpoint} tells the classes {known} apart, in this order, but the data have {classes}. Give images of "
            "the same classes, with +data.source.root=... or another data=..."
        )


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="eval")
def _run(config: DictConfig) -> None:
    if in_sweep() and is_many_processes(config.trainer.get("devices", "auto"), config.trainer.get("num_nodes", 1)):
        run_in_own_process(_MODULE)
        return
    with one_job(_MODULE):
        evaluate(config)


def main() -> None:
    """Entry point of ``lqf-eval``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
