"""What a data module can say once its samples are listed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import LightningDataModule
from torch import Tensor

from lqf_lightning.data.dataset import Normalization, check_normalization
from lqf_lightning.data.image_sets import ImageSets
from lqf_lightning.data.manifest import Manifest


class ListedSamples(LightningDataModule):
    """Manifest, classes and normalization of a data module.

    Attributes:
        copies: Samples that a training image stands for where a method sweeps over fixed ones.
    """

    copies: int = 1

    _manifest: Manifest | None = None
    _normalization: Normalization | None = None
    _built: ImageSets | None = None  # what depends on both

    @property
    def manifest(self) -> Manifest:
        """The samples of the run.

        Raises:
            RuntimeError: `setup()` has not run.
        """
        if self._manifest is None:
            raise RuntimeError("call setup() before asking for samples or classes")
        return self._manifest

    @contextmanager
    def manifest_restored(self) -> Iterator[None]:
        """Take back at the end what `forget` does meanwhile.

        Yields:
            Nothing.
        """
        known = self._manifest
        try:
            yield
        finally:
            self._manifest, self._built = known, None

    def image_of(self, index: Tensor) -> Tensor:
        """Find the images that samples show: a copy of an image has an index of its own.

        Args:
            index: Of samples of any split, as in batches (B,).

        Returns:
            Rows of the manifest (B,); the indices themselves where there are no copies.
        """
        return index % len(self.manifest)

    def together(self, index: Tensor) -> Tensor:
        """Number the images among some samples: those of one number are copies of one image, and are left out together.

        Args:
            index: Of all the samples (n,), the same on every rank.

        Returns:
            Numbers from 0 up, in order of the manifest (n,).
        """
        numbers: Tensor = torch.unique(self.image_of(index), return_inverse=True)[1]
        return numbers

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.manifest.classes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def test_split(self) -> str:
        """The split that testing uses: `test`, or `val` where the data set has no test split."""
        return "test" if len(self.manifest.rows("test")) else "val"

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation per channel, for pixels in [0, 1].

        Raises:
            RuntimeError: Nobody has set it.
        """
        if self._normalization is None:
            raise RuntimeError("set `normalization` to the (mean, std) of the backbone before asking for a loader")
        return self._normalization

    @normalization.setter
    def normalization(self, value: Normalization) -> None:
        check_normalization(value)
        self._normalization = (tuple(value[0]), tuple(value[1]))
        self._built = None
