"""A progress bar for long work outside the training loop."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on the first rank's terminal; a log file shows nothing.

    Args:
        items: What to go through.
        description: What the work is, in a few words.
        total: Number of items, where `items` cannot tell.

    Yields:
        The items.
    """
    console = Console(stderr=True)
    silent = getattr(rank_zero_only, "rank", 0) != 0 or not console.is_terminal
    yield from rich_track(items, description, total=total, console=console, disable=silent, transient=True)
