"""`lqf-score`: what every training sample of a finished run tells, or what a multirun over subsets does."""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig

from lqf_lightning._launch import in_sweep, is_many_processes, one_job, run_in_own_process
from lqf_lightning.analysis.finished import LooksBack
from lqf_lightning.finished_run import open_run, steps_taken
from lqf_lightning.memorization_report import reduce_runs
from lqf_lightning.train import build_trainer, prepare_process

log = logging.getLogger(__name__)
_MODULE = "lqf_lightning.score"


def score(config: DictConfig) -> Path:
    """Score the training samples of a checkpoint's run, or reduce the runs of a multirun.

    Args:
        config: The composed configuration (see ``conf/score.yaml``).

    Returns:
        The folder that holds the results.

    Raises:
        ValueError: Neither a checkpoint nor a folder of runs is given, or both, or a threshold without runs.
    """
    folder = Path(config.paths.output_dir)
    if (config.checkpoint is None) == (config.runs is None):
        raise ValueError(
            f"got checkpoint={config.checkpoint} and runs={config.runs}, expected one of them. Set "
            "checkpoint=RUN/checkpoints/last.ckpt, or runs=multirun/DATE"
        )
    if config.threshold is not None and config.runs is None:
        raise ValueError(
            f"got threshold={config.threshold}, which is of memorization over runs, and no runs. Set threshold=null, "
            "or runs=multirun/DATE in place of the checkpoint"
        )
    if config.runs is not None:
        report = reduce_runs(Path(config.runs).absolute(), folder, threshold=config.threshold)
        log.info("%s", json.dumps(report, indent=2))
        return folder
    checkpoint = Path(config.checkpoint).absolute()
    run, data, method = open_run(config, checkpoint, folder)
    trainer = build_trainer(run, folder, data.classes)
    scorers = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, LooksBack)]
    for scorer in scorers:
        scorer.start = copy.deepcopy(method.backbone)  # the checkpoint will replace the pre-trained weights
        scorer.steps = steps_taken(checkpoint)
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")  # none of them is needed
    check = trainer.validate if len(data.val_dataloader()) else trainer.test
    check(method, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    return folder


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="score")
def _run(config: DictConfig) -> None:
    if in_sweep() and is_many_processes(config.trainer.get("devices", "auto"), config.trainer.get("num_nodes", 1)):
        run_in_own_process(_MODULE)
        return
    with one_job(_MODULE):
        folder = score(config)
    log.info("scores in %s", folder)


def main() -> None:
    """Entry point of ``lqf-score``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
