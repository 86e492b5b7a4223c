"""One Hydra job is one clean process group.

Lightning starts further ranks with the parent's command line, which in a sweep is the whole sweep; it also leaves
process groups, environment variables and open W&B runs behind for the next job. See Lightning-AI/pytorch-lightning
issues 2727 and 11617, and hydra-ecosystem/hydra issue 2070.
"""

import contextlib
import importlib.machinery
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import read_write

from lqf_lightning.run_folder import read_metrics

# Hydra overrides that belong to the process that launches jobs, not to a job.
_CONTROLLER = ("hydra.mode=", "hydra.run.dir=", "hydra.sweep", "hydra/sweep", "hydra.launcher", "hydra/launcher")
_LAST_WORDS_S = 5


def is_many_processes(devices: Any, num_nodes: int = 1) -> bool:
    """Whether a Trainer with these settings starts processes of its own.

    Args:
        devices: The Trainer's `devices`: a number, a list of devices, "auto" or -1.
        num_nodes: The Trainer's `num_nodes`.

    Returns:
        True unless it is known to stay in one process.

    Example:
        >>> is_many_processes(1), is_many_processes("1"), is_many_processes([0]), is_many_processes(2)
        (False, False, False, True)
    """
    if isinstance(devices, (list, tuple)):
        return len(devices) > 1 or num_nodes > 1
    return str(devices) != "1" or num_nodes > 1


def in_sweep() -> bool:
    """Whether the current job is one of a Hydra multirun.

    Returns:
        True in a multirun, in the process that runs its jobs.
    """
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def run_in_own_process(module: str) -> dict[str, float]:
    """Run the current job of a sweep as a command of its own, and wait for it.

    Lightning ends a failing group of ranks by killing the main process, which must not be the sweep.

    Args:
        module: Dotted name of the entry point, started as ``python -m module``.

    Returns:
        The job's final metrics, read from its ``metrics.json``.

    Raises:
        RuntimeError: The job failed.
    """
    output = HydraConfig.get().runtime.output_dir
    command = [sys.executable, "-m", module, *_single_run_arguments(), f'hydra.run.dir="{output}"']
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise RuntimeError(f"the job of {output} failed with exit code {code}; its messages stand above")
    return read_metrics(Path(output))


@contextlib.contextmanager
def one_job(module: str) -> Iterator[None]:
    """Make the ranks that Lightning starts run this job and nothing else, and leave no trace of it.

    Args:
        module: Dotted name of the entry point, started as ``python -m module``.

    Yields:
        Nothing.
    """
    import __main__  # looked up when needed: under pytest and notebooks it is another module

    # The writable original, set while a Hydra job runs; HydraConfig.get() gives the same, declared read-only.
    hydra = HydraConfig.instance().cfg.hydra  # type: ignore[union-attr]
    spec, argv, environment, run_dir = __main__.__spec__, sys.argv, dict(os.environ), hydra.run.dir
    __main__.__spec__ = importlib.machinery.ModuleSpec(module, None)
    sys.argv = [argv[0], *_single_run_arguments()]
    with read_write(hydra.run):  # Lightning hands hydra.run.dir on to the other ranks
        hydra.run.dir = hydra.runtime.output_dir
    try:
        yield
    except BaseException:
        _release_observers()
        _finish_wandb(exit_code=1)
        raise
    else:
        _finish_wandb(exit_code=0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        with read_write(hydra.run):
            hydra.run.dir = run_dir
        __main__.__spec__, sys.argv = spec, argv
        os.environ.clear()
        os.environ.update(environment)


def _single_run_arguments() -> list[str]:
    hydra = HydraConfig.get()
    flags = ["--config-name", hydra.job.config_name] if hydra.job.config_name else []
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", str(Path(source.path).absolute())]
    kept = [override for override in hydra.overrides.hydra if not override.startswith(_CONTROLLER)]
    return [*flags, *hydra.overrides.task, *kept]


def _finish_wandb(exit_code: int) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish(exit_code=exit_code)


def _release_observers() -> None:
    # Lightning's thread kills this process as soon as it sees a failed rank. This process knows already, and is about
    # to write down the failure: the thread gets nothing more to watch, and the ranks are ended here.
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            processes, thread._child_processes = thread._child_processes, []  # type: ignore[attr-defined]
            for process in processes:
                try:
                    process.wait(_LAST_WORDS_S)  # a rank that failed first is still writing its traceback
                except subprocess.TimeoutExpired:
                    process.kill()
