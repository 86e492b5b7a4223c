"""Wrong labels put in on purpose, to study what they do."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lqf_lightning.data.selection import choose_lowest, draw_lots


def flip_labels(
    paths: Sequence[str], labels: Sequence[int], num_classes: int, fraction: float, seed: int
) -> npt.NDArray[np.int64]:
    """Give `round(fraction * N)` samples the label of another class, each other class being equally likely.

    Args:
        paths: Names of the samples (N,).
        labels: True labels (N,).
        num_classes: Number of classes C.
        fraction: Share of wrong labels.
        seed: Decides which samples and which labels.

    Returns:
        Labels (N,).

    Example:
        >>> flip_labels(["a", "b", "c", "d"], [0, 0, 0, 0], 2, 0.5, 0).sum()
        np.int64(2)
    """
    given = np.array(labels, dtype=np.int64)
    wrong = choose_lowest(draw_lots(paths, seed, "noise"), round(fraction * len(given)))
    steps = draw_lots([paths[row] for row in wrong], seed, "wrong label") % np.uint64(max(num_classes - 1, 1))
    given[wrong] = (given[wrong] + 1 + steps.astype(np.int64)) % num_classes
    return given
