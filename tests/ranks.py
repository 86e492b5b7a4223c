"""Run a function on several processes of one gloo group and bring its results back."""

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on every rank of a fresh group; inside, `torch.distributed` is ready.

    The processes are forked, which is fast and lets `function` be a closure; what it returns must be something that
    `torch.save` can store.

    Args:
        world_size: Number of processes.
        function: Called on every rank.
        *arguments: Handed over as they are.

    Returns:
        The results, by rank.

    Raises:
        RuntimeError: With the traceback of every rank that failed.
    """
    # Autograd threads and OpenMP pools do not survive a fork; one thread has no pool.
    torch.set_num_threads(1)
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        workers: list[BaseProcess] = [
            context.Process(target=_work, args=(rank, world_size, folder, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        if errors or any(worker.exitcode != 0 for worker in workers):
            for worker in workers:
                worker.kill()
            raise RuntimeError("\n".join(errors) or f"exit codes {[worker.exitcode for worker in workers]}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]
