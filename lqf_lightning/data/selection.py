"""Choosing samples by lot, so that a choice survives the removal or arrival of other samples.

Every sample draws a number from (seed, purpose, path). Taking the lowest numbers makes smaller choices subsets of
larger ones, and a vanished file changes nothing but its own place.
"""

import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt


def draw_lots(paths: Iterable[str], seed: int, purpose: str) -> npt.NDArray[np.uint64]:
    """Draw one number per sample from (seed, purpose, path).

    Args:
        paths: Names of the samples.
        seed: The seed; other seeds give unrelated numbers.
        purpose: What the lot decides; other purposes give unrelated numbers.

    Returns:
        Numbers (N,), uniform over 64 bits.

    Example:
        >>> draw_lots(["a.png", "b.png"], 0, "val").tolist() == draw_lots(["b.png", "a.png"], 0, "val").tolist()[::-1]
        True
    """
    key = struct.pack("<q", seed) + purpose.encode()
    digests = b"".join(blake2b(path.encode(), digest_size=8, key=key[:64]).digest() for path in paths)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def choose_lowest(lots: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.int64]:
    """Choose the samples with the lowest lots.

    Args:
        lots: One number per sample (N,).
        count: How many to choose.

    Returns:
        Positions (count,) in increasing order.
    """
    return np.sort(np.argsort(lots, kind="stable")[:count])


def choose_fraction_per_class(
    lots: npt.NDArray[np.uint64], labels: Sequence[int], fraction: float, *, leave: int = 1
) -> npt.NDArray[np.int64]:
    """Choose `round(fraction * size)` samples of every class, but at least one, and leave some.

    Args:
        lots: One number per sample (N,).
        labels: One class per sample (N,).
        fraction: Share of every class, between 0 and 1.
        leave: How many samples of every class to leave at least, before anything is chosen.

    Returns:
        Positions in increasing order.
    """
    chosen = []
    for members in _members(labels).values():
        count = min(max(round(fraction * len(members)), 1), len(members) - leave)
        chosen.append(members[choose_lowest(lots[members], count)])
    return np.sort(np.concatenate(chosen))


def choose_count_per_class(
    lots: npt.NDArray[np.uint64],
    labels: Sequence[int],
    count: int,
    classes: Sequence[str],
    option: str = "shots",
    absent: Sequence[int] = (),
) -> npt.NDArray[np.int64]:
    """Choose the same number of samples from every class.

    Args:
        lots: One number per sample (N,).
        labels: One class per sample (N,).
        count: How many per class.
        classes: Names of the classes.
        option: Name of the option of the data that asks for the count.
        absent: Positions of classes that need not have any.

    Returns:
        Positions in increasing order.

    Raises:
        ValueError: A class that is not `absent` has fewer than `count` samples.
    """
    members = _members(labels)
    short = {name: len(members.get(label, ())) for label, name in enumerate(classes) if label not in absent}
    short = {name: size for name, size in short.items() if size < count}
    if short:
        listed = ", ".join(f"{name} ({size})" for name, size in sorted(short.items(), key=lambda pair: pair[1])[:5])
        raise ValueError(
            f"data.{option}={count} asks for {count} training images per class, but {len(short)} of {len(classes)} "
            f"classes have fewer: {listed}. Set data.{option}={min(short.values())} or lower, or null for all."
        )
    return np.sort(np.concatenate([rows[choose_lowest(lots[rows], count)] for rows in members.values()]))


def _members(labels: Sequence[int]) -> dict[int, npt.NDArray[np.int64]]:
    members: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        members[int(label)].append(position)
    return {label: np.array(members[label]) for label in sorted(members)}
