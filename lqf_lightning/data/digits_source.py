"""Handwritten digits that come with scikit-learn: real images without a download."""

import numpy as np

from lqf_lightning.data.images import ArrayImages
from lqf_lightning.data.selection import choose_fraction_per_class, draw_lots
from lqf_lightning.data.source import Samples, Source


class DigitsSource(Source):
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn carries (Alpaydin and Kaynak, 1998).

    The set has no official split. A fixed fifth of every class is the test split, whatever the seeds of the run.
    """

    in_memory = True

    def load(self) -> dict[str, Samples]:
        """Load the digits as gray images.

        Returns:
            Samples under `train` and `test`.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "data=digits reads the images from scikit-learn, which is not installed. "
                "Run: pip install 'lqf-lightning[quickstart]' (or choose other images, as in data=folder)",
                name=error.name,
            ) from error
        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        labels = np.asarray(digits.target, dtype=np.int64)
        lots = draw_lots(map(str, range(len(labels))), 0, "digits/test")
        test = choose_fraction_per_class(lots, labels.tolist(), 0.2)
        train = np.setdiff1d(np.arange(len(labels)), test)
        return {name: _samples(images, labels, rows) for name, rows in (("train", train), ("test", test))}


def _samples(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Samples:
    paths = [f"digits/{row}" for row in rows]
    return Samples(ArrayImages(images[rows], "digits"), paths, labels[rows].tolist(), [str(n) for n in range(10)])
