"""Weights & Biases: online with an account, offline without."""

import configparser
import contextlib
import netrc
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

_LONGEST_NAME = 100  # more does not fit into the dashboard's list


def wandb_logger(
    save_dir: str,
    *,
    project: str = "lqf-lightning",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    log_model: bool = False,
    **settings: Any,
) -> WandbLogger:
    """A logger whose run can be resumed, grouped by sweep, and needs no account.

    The run's id is kept in the run folder: a resumed run continues its W&B run. Without credentials and without
    `WANDB_MODE`, the run is written to the folder only; ``wandb sync`` uploads it later.

    Args:
        save_dir: The run folder.
        project: W&B project.
        name: Display name; None takes the job's overrides, or the folder's name.
        group: W&B group; None takes the sweep's folder for a job of a sweep.
        tags: W&B tags.
        log_model: Also upload checkpoints as artifacts.
        settings: Further arguments of ``wandb.init``.

    Returns:
        The logger.
    """
    folder = Path(save_dir)
    if "WANDB_MODE" not in os.environ and not has_credentials():
        os.environ |= {"WANDB_MODE": "offline", "WANDB_QUIET": "true"}
    logger: WandbLogger = WandbLogger(
        name=name or _job_name(folder),
        save_dir=folder,
        project=project,
        id=_kept_id(folder),
        log_model=log_model,
        group=group or _sweep_name(folder),
        tags=list(tags),
        resume="allow",
        **settings,
    )
    # Lightning 2.6 passes a setting that W&B has withdrawn and warns about at every start.
    logger._wandb_init.pop("anonymous", None)
    return logger


def has_credentials() -> bool:
    """Whether W&B could log in without asking.

    Returns:
        True if the environment or the netrc file holds a key for the W&B server.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc").expanduser()
    try:
        entry = netrc.netrc(file).authenticators(urlparse(_server()).netloc)  # W&B's own entries carry the port
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return False
    return entry is not None and bool(entry[2])


def _server() -> str:
    # Where `wandb login --host` leaves the address of a server of one's own.
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(folder / "settings")
    known = settings.get("default", "base_url", fallback="https://api.wandb.ai")
    return os.environ.get("WANDB_BASE_URL") or known


def _kept_id(folder: Path) -> str | None:
    if getattr(rank_zero_only, "rank", 0) != 0:
        return None  # only rank 0 has a W&B run
    path = folder / "wandb_run_id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _job_name(folder: Path) -> str:
    overrides = str(HydraConfig.get().job.override_dirname) if HydraConfig.initialized() else ""
    return overrides if 0 < len(overrides) <= _LONGEST_NAME else folder.name


def _sweep_name(folder: Path) -> str | None:
    parent = folder.absolute().parent
    return parent.name if (parent / "multirun.yaml").exists() else None
