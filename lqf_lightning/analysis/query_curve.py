"""How much answers to more and more queries tell of the difference between two linear models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.analysis.query_set import QuerySet, gather_images, spread_evenly
from lqf_lightning.linear.metric import dot
from lqf_lightning.methods import LQF
from lqf_lightning.methods.solvers.training_table import fixed_batches

_ROUNDING = 0.01  # by how much, as a share, queries that span all weights may seem to tell more than these


def query_curve(
    method: LQF, data: Any, change: Mapping[str, Tensor], number: int, sigma: float
) -> list[dict[str, float]]:
    """Ask about 1, 2, 4, ... test images; what they tell never exceeds what the weights do. All ranks call this.

    Args:
        method: The method, attached to a trainer.
        data: Its data module.
        change: Difference of the weights before noise, intercept included, by name.
        number: Most queries.
        sigma: Deviation of the noise on every weight of both.

    Returns:
        "number" of queries and "nats", in order; empty where there is no test image.
    """
    loader = data.test_dataloader()
    if not len(loader):
        return []
    index = torch.tensor(data.manifest.rows(data.test_split)["index"].to_numpy(copy=True))
    wanted = spread_evenly(index, number, len(method.classes))
    images = gather_images(wanted, fixed_batches(method, loader, "queries"))
    counts = [2**power for power in range(len(wanted).bit_length()) if 2**power < len(wanted)] + [len(wanted)]
    curve, most, whole = [], 0.0, 0.5 * dot(dict(change), dict(change)) / sigma**2
    for count in counts:
        queries = QuerySet.of(method, images[:count], wanted[:count])
        told = queries.information(method, {"change": change}, sigma)["change"]
        told = whole if whole < told <= (1 + _ROUNDING) * whole else told  # a larger excess is an error, and stays
        most = max(most, told)  # directions lost in rounding come and go with the queries
        curve.append({"number": float(count), "nats": most})
    return curve
