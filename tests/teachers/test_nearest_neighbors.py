import math

import pytest
import torch
from torch import Tensor

from lqf_lightning.teachers import nearest_neighbors
from lqf_lightning.teachers.nearest_neighbors import neighbor_votes

CLASSES = 4


def draw(number: int, seed: int) -> Tensor:
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERIES, MEMORY = draw(13, 1), draw(40, 2)
LABEL = torch.randint(CLASSES, (40,), generator=torch.Generator().manual_seed(3))


def brute_force(k: int, temperature: float | None) -> list[list[float]]:
    votes = []
    for query in QUERIES:
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in MEMORY]
        nearest = sorted(range(40), key=lambda row: -cosines[row])[:k]
        counted = [0.0] * CLASSES
        for row in nearest:
            weight = 1.0 if temperature is None else math.exp((cosines[row] - cosines[nearest[0]]) / temperature)
            counted[int(LABEL[row])] += weight
        votes.append(counted)
    return votes


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("temperature", [None, 0.07, 1.0])
def test_votes_are_those_of_a_search_by_hand(k: int, temperature: float | None) -> None:
    got = neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, k=k, temperature=temperature)
    assert got.tolist() == [pytest.approx(row, rel=1e-10) for row in brute_force(k, temperature)]


def test_weights_change_predictions() -> None:
    """Else the test above would not see a temperature that is not used."""
    equal, weighted = (neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, 15, t).argmax(1) for t in (None, 0.07))
    assert (equal != weighted).any()


@pytest.mark.parametrize("entries", [1, 3 * 40, 5 * 40 + 39, 10**6])
def test_how_many_queries_are_taken_at_once_does_not_matter(entries: int, monkeypatch) -> None:
    whole = neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, 7, 0.1)
    monkeypatch.setattr(nearest_neighbors, "_ENTRIES", entries)
    torch.testing.assert_close(neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, 7, 0.1), whole, rtol=1e-12, atol=0)
    counts = neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, 7)
    assert counts.sum(1).tolist() == [7] * 13


def test_a_stretched_copy_finds_its_original() -> None:
    own = torch.arange(40)
    votes = neighbor_votes(MEMORY * torch.rand(40, 1).double().add(0.1), 1e3 * MEMORY, own, classes=40, k=1)
    assert torch.equal(votes, torch.eye(40, dtype=torch.float64))


def test_of_classes_with_equal_votes_the_lower_position_is_predicted() -> None:
    memory = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.4]])
    for label in ([3, 1, 1, 3], [1, 3, 3, 1]):
        votes = neighbor_votes(torch.tensor([[1.0, 0.0]]), memory, torch.tensor(label), CLASSES, k=4)
        assert votes.tolist() == [[0.0, 2.0, 0.0, 2.0]]
        assert votes.argmax(1).item() == 1


def test_a_tiny_temperature_is_the_nearest_neighbor() -> None:
    nearest = neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, k=1)
    torch.testing.assert_close(neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, 20, temperature=1e-6), nearest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """Features of 300 have a norm that half precision cannot hold."""
    queries, memory = (300 * QUERIES).to(dtype), (300 * MEMORY).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = neighbor_votes(queries, memory, LABEL, CLASSES, 7, 0.1)
    assert got.dtype == torch.float32
    expected = neighbor_votes(queries.double(), memory.double(), LABEL, CLASSES, 7, 0.1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_no_query_is_no_error() -> None:
    assert neighbor_votes(QUERIES[:0], MEMORY, LABEL, CLASSES, 7).shape == (0, CLASSES)


def test_wrong_input_is_refused() -> None:
    for k in (0, 41):
        with pytest.raises(ValueError, match=rf"ask {k} neighbors in a memory of 40 .*Set callbacks.knn.k=20"):
            neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, k=k)
    with pytest.raises(ValueError, match="in a memory of 0"):
        neighbor_votes(QUERIES, MEMORY[:0], LABEL[:0], CLASSES, k=1)
    with pytest.raises(ValueError, match=r"Set callbacks.knn.temperature=0.07"):
        neighbor_votes(QUERIES, MEMORY, LABEL, CLASSES, 7, temperature=0.0)
    with pytest.raises(ValueError, match="between 0 and 3, got -1 to"):
        neighbor_votes(QUERIES, MEMORY, torch.where(LABEL == 0, -1, LABEL), CLASSES, 7)
    with pytest.raises(ValueError, match="between 0 and 2, got 0 to 3"):
        neighbor_votes(QUERIES, MEMORY, LABEL, 3, 7)
    with pytest.raises(ValueError, match=r"got \(13, 6\), \(40, 5\) and \(40,\)"):
        neighbor_votes(QUERIES, MEMORY[:, :5], LABEL, CLASSES, 7)
