from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lqf_lightning.analysis.query_curve import query_curve
from lqf_lightning.data import Batch
from methods.dense_lqf import build
from methods.tensors import build_trainer, draw

SIGMA = 0.1


class Queries:
    """A data module that has nothing but test images."""

    test_split = "test"

    def __init__(self, count, kind):
        images = torch.randn(count, *draw(1)[0].shape[1:], generator=torch.Generator().manual_seed(1)).to(kind)
        self.rows = [Batch(images, torch.zeros(count, dtype=torch.int64), torch.arange(count))]
        self.manifest = SimpleNamespace(rows=lambda split: {"index": SimpleNamespace(to_numpy=self.index)})

    def index(self, copy):
        return np.arange(len(self.rows[0].index))

    def test_dataloader(self):
        return DataLoader(self.rows, batch_size=None)


def curve(kind, count, layers):
    method = build(layers=layers).to(kind)
    method.trainer = trainer = build_trainer(1)
    draws = torch.Generator().manual_seed(3)
    change = {name: torch.randn(v.shape, generator=draws).to(kind) for name, v in method.linearized.deltas.items()}
    whole = sum(float(entry.double().square().sum()) for entry in change.values()) / 2 / SIGMA**2
    with torch.no_grad():
        return query_curve(method, Queries(count, kind), change, count, SIGMA), whole, trainer


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [["head"], None])
def test_more_answers_tell_more_and_never_more_than_the_weights(kind, layers):
    found, whole, _ = curve(kind, 16, layers)
    assert [entry["number"] for entry in found] == [1, 2, 4, 8, 16]
    told = [entry["nats"] for entry in found]
    assert told == sorted(told)
    assert 0 < told[0] < 0.5 * whole
    # 4 images and 3 outputs span the 12 weights of the head: equality, which rounding may exceed.
    assert told[-1] <= whole * (1 + 1e-12)
    if layers is not None:
        assert told[2] == pytest.approx(whole, rel=1e-3)
