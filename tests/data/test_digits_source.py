import sys

import numpy as np
import pytest

from lqf_lightning.data import DigitsSource


def test_the_split_is_fixed_stratified_and_complete():
    splits = DigitsSource().load()
    train, test = splits["train"], splits["test"]
    assert len(train.paths) + len(test.paths) == 1797
    assert not set(train.paths) & set(test.paths)
    shares = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert np.allclose(shares, 0.2, atol=0.5 / 170)  # rounding within classes of more than 170
    assert test.paths == DigitsSource().load()["test"].paths


def test_images_belong_to_their_labels():
    from sklearn.datasets import load_digits

    digits = load_digits()
    for samples in DigitsSource().load().values():
        for position in (0, 100):
            row = int(samples.paths[position].split("/")[1])
            image = samples.images.read(position)
            assert samples.labels[position] == digits.target[row]
            assert np.abs(np.asarray(image)[..., 1] / 255 * 16 - digits.images[row]).max() < 0.05
            assert image.mode == "RGB"


def test_missing_scikit_learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lqf-lightning\[quickstart\]'"):
        DigitsSource().load()
