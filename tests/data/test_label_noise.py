import numpy as np
import pytest

from lqf_lightning.data.label_noise import flip_labels

PATHS = [f"{n}" for n in range(3000)]
LABELS = [n % 3 for n in range(3000)]


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9])
def test_exactly_the_share_of_labels_becomes_wrong(fraction):
    given = flip_labels(PATHS, LABELS, 3, fraction, 0)
    assert (given != LABELS).sum() == round(fraction * 3000)
    assert set(given) <= {0, 1, 2}


def test_every_other_class_is_equally_likely():
    given = flip_labels(PATHS, [0] * 3000, 4, 0.9, 1)
    counts = np.bincount(given, minlength=4)
    assert counts[0] == 300
    assert (abs(counts[1:] - 900) < 4 * 25).all()  # binomial: standard deviation below 25


def test_the_seed_decides():
    assert (flip_labels(PATHS, LABELS, 3, 0.3, 0) == flip_labels(PATHS, LABELS, 3, 0.3, 0)).all()
    assert (flip_labels(PATHS, LABELS, 3, 0.3, 0) != flip_labels(PATHS, LABELS, 3, 0.3, 1)).any()
