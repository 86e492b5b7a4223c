import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

from lqf_lightning.methods.classification_metrics import NO_SAMPLE, classification_metrics
from ranks import run_on_ranks

CLASSES = ["ant", "bee", "cat", "dog"]


def sample(number=200, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, classes, generator=generator)
    return logits, torch.randint(0, classes, (number,), generator=generator)


def computed(*batches, classes=CLASSES, stage="val"):
    metrics = classification_metrics(classes, stage)
    for logits, target in batches:
        metrics.update(logits, target)
    return {name: value.item() for name, value in metrics.compute().items()}


def calibration_error(logits, target, bins=15):
    """Sum over bins of |accuracy - confidence|, weighted by the share of samples (Guo et al., ICML 2017, eq. 3)."""
    probabilities = torch.softmax(logits.double(), -1).numpy()
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == target.numpy()
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(
        abs(right[place == k].mean() - confidence[place == k].mean()) * (place == k).mean()
        for k in range(bins)
        if (place == k).any()
    )


def test_values_are_those_of_sklearn_and_of_the_definition():
    logits, target = sample()
    got, predicted = computed((logits[:70], target[:70]), (logits[70:], target[70:])), logits.argmax(-1)
    assert set(got) == {"val/acc", "val/ece", *(f"val/acc/{c}" for c in CLASSES)}
    assert got["val/acc"] == pytest.approx(accuracy_score(target, predicted))
    assert [got[f"val/acc/{c}"] for c in CLASSES] == pytest.approx(recall_score(target, predicted, average=None))
    assert got["val/ece"] == pytest.approx(calibration_error(logits, target), abs=1e-6)


def test_keys_carry_the_stage():
    assert {name.partition("/")[0] for name in computed(sample(), stage="test")} == {"test"}


def test_calibration_error_by_hand():
    # Two samples of confidence 0.9, one right: |0.5 - 0.9|. One of confidence 0.6, right: |1 - 0.6|.
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]).log()
    got = computed((logits, torch.tensor([0, 1, 1])), classes=["ant", "bee"])
    assert got["val/ece"] == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4, abs=1e-6)


def test_outputs_that_look_like_probabilities_are_outputs_all_the_same():
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [1.0, 0.0]])
    target = torch.tensor([0, 1, 1])
    expected = calibration_error(logits, target)
    assert computed((logits, target), classes=["ant", "bee"])["val/ece"] == pytest.approx(expected, abs=1e-6)
    both = torch.cat([logits, 10 * logits]), torch.cat([target, target])
    apart = computed((logits, target), (10 * logits, target), classes=["ant", "bee"])
    assert apart == pytest.approx(computed(both, classes=["ant", "bee"]))


def test_a_class_without_samples_has_no_accuracy():
    logits, target = sample()
    kept = target != 2
    got = computed((logits[kept], target[kept]))
    assert math.isnan(got["val/acc/cat"])
    assert got["val/acc/ant"] == (logits[target == 0].argmax(-1) == 0).float().mean().item()
    predicted = torch.nn.functional.one_hot(torch.full((3,), 2), 4).float()  # predicted, but never true
    assert math.isnan(computed((predicted, torch.tensor([0, 1, 3])))["val/acc/cat"])


def test_rows_without_a_sample_do_not_count():
    logits, target = sample(50)
    marked = torch.cat([target, torch.full((3,), NO_SAMPLE)])
    padded = torch.cat([logits, torch.zeros(3, 4)])
    empty = torch.zeros(1, 4), torch.tensor([NO_SAMPLE])
    expected = computed((logits, target))
    assert computed((padded, marked)) == pytest.approx(expected)
    assert computed(empty, (logits, target), empty) == pytest.approx(expected)


def test_outputs_that_are_no_numbers_do_not_stop_the_report():
    logits, target = torch.full((4, 4), math.nan), torch.tensor([1, 2, 3, 1])
    assert computed((logits, target))["val/acc"] == 0.0


@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_ranks_give_the_values_of_all_samples(world_size):
    logits, target = sample(31)
    cuts = [0, 20, 31] if world_size == 2 else [0, 20, 31, 31]

    def compute():
        import torch.distributed as dist

        mine = slice(cuts[dist.get_rank()], cuts[dist.get_rank() + 1])
        rows = logits[mine], target[mine]
        return computed(rows if len(rows[1]) else (torch.zeros(1, 4), torch.tensor([NO_SAMPLE])))

    for got in run_on_ranks(world_size, compute):
        assert got == pytest.approx(computed((logits, target)), abs=1e-6)
