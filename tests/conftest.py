import logging
import os
import sys
from pathlib import Path

import pytest
import torch

# Plug-ins and ranks of these tests run in other processes too: no GPU choice, no account, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("WANDB_API_KEY", None)
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def quiet_lightning():
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture
def wandb_runs(tmp_path, monkeypatch):
    """Runs W&B offline in the test's folder; calling the fixture ends W&B's service and reads the runs back."""
    import wandb

    from wandb_offline import read_run

    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        folder = tmp_path / f"wandb_{name.lower()}"
        folder.mkdir()
        monkeypatch.setenv(f"WANDB_{name}", str(folder))
    monkeypatch.delenv("WANDB_DIR")  # each run writes into its own folder
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()

    def read():
        wandb.teardown()  # the log may grow until then
        return [read_run(path) for path in sorted(tmp_path.rglob("run-*.wandb"))]

    yield read
    wandb.teardown()


@pytest.fixture(scope="session")
def folder_of_shapes(tmp_path_factory):
    """A small image folder: three classes of 16-pixel pictures, uneven validation and test sets."""
    from tiny import write_shapes

    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root / "train", per_class=8, seed=0)
    write_shapes(root / "val", per_class=3, seed=1, extra=2)
    write_shapes(root / "test", per_class=4, seed=2, extra=1)
    return root


@pytest.fixture
def console(tmp_path):
    """Run one of our commands in a process of its own, without a GPU, a network or an account."""
    import subprocess

    def run(program, *arguments, check=True, timeout=240, env=None):
        environment = {
            **os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {}),
        }  # fmt: skip
        command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    return run
