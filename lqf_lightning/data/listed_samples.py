"""What a data module can say once its samples are listed."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning import LightningDataModule

from lqf_lightning.data.dataset import Normalization, check_normalization
from lqf_lightning.data.image_sets import ImageSets
from lqf_lightning.data.manifest import Manifest


class ListedSamples(LightningDataModule):
    """Manifest, classes and normalization of a data module."""

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
