"""From a source of images to the batches of one process."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader

from lqf_lightning.data.augmentation import NoAugmentation
from lqf_lightning.data.batch import Batch
from lqf_lightning.data.dataset import ImageDataset, Record
from lqf_lightning.data.images import Images
from lqf_lightning.data.loader import TrainingLoader, loader_options
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.plan import Plan
from lqf_lightning.data.pool import Pool
from lqf_lightning.data.refusals import refuse_sizes, refuse_unlearnable, refuse_unusable, refuse_workers
from lqf_lightning.data.sampler import SweepSampler, TrainingSampler, UnpaddedSampler
from lqf_lightning.data.source import Source
from lqf_lightning.data.world import World
from lqf_lightning.teachers import View

log = logging.getLogger(__name__)
Normalization = tuple[Sequence[float], Sequence[float]]


class ImageDataModule(LightningDataModule):
    """Image classification data with one index per sample.

    `setup()` lists the samples, refuses what cannot be trained on and builds the manifest. The loaders need the
    backbone's `normalization`, and a trainer with `use_distributed_sampler=False`: they share out samples themselves.

    Args:
        source: Where the images come from.
        image_size: Side of the square that the network sees, in pixels.
        crop_fraction: Share of the shorter side that evaluation keeps.
        augmentation: Called with `size` and `crop_fraction`, gives the transform of training images; None: none.
        batch_size: Samples per training step of all processes together.
        eval_batch_size: Samples per evaluation step of all processes together; None: as in training.
        drop_last: Leave out the training samples that do not fill a batch.
        num_workers: Worker processes per loader; None: 0 for images in memory, else the cores of this process up to 8.
        val_fraction: Share of every class held out of training when the data set has no validation split.
        split_seed: Decides which.
        shots: Training images per class; None: all.
        subset_ratio: Share of the training images; a smaller share is a subset of a larger one.
        subset_seed: Decides which, for both.
        label_noise: Share of the training images that get the label of another class.
        noise_seed: Decides which, and which label.
        cache_images: Keep resized images in memory where no augmentation is drawn.
        manifest: Manifest of an earlier run; its samples keep index, split and label.
        seed: Decides order and augmentation.

    Attributes:
        sweeps: How often a training epoch goes through `fixed_train_dataloader`; 0: ordinary training.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int = 224,
        crop_fraction: float = 0.875,
        augmentation: Callable[..., Callable[[Image.Image], Image.Image]] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        shots: int | None = None,
        subset_ratio: float = 1.0,
        subset_seed: int = 0,
        label_noise: float = 0.0,
        noise_seed: int = 0,
        cache_images: bool = False,
        manifest: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_once = batch_size if eval_batch_size is None else eval_batch_size
        refuse_sizes(image_size, crop_fraction, batch_size, at_once)
        refuse_workers(num_workers, cache_images)
        self.source = source
        self.image_size, self.crop_fraction = image_size, crop_fraction
        self.batch_size, self.eval_batch_size = batch_size, at_once
        self.drop_last = drop_last
        self.num_workers = 0 if num_workers is None and (source.in_memory or cache_images) else num_workers
        self.cache_images = cache_images
        self.previous, self.seed = manifest, seed
        self.plan = Plan(val_fraction, split_seed, shots, subset_ratio, subset_seed, label_noise, noise_seed)
        self.evaluation_transform = NoAugmentation(size=image_size, crop_fraction=crop_fraction)
        self.training_transform = (augmentation or NoAugmentation)(size=image_size, crop_fraction=crop_fraction)
        self.sweeps = 0
        self._manifest: Manifest | None = None
        self._places: dict[str, tuple[Images, int]] = {}
        self._normalization: Normalization | None = None
        self._evaluated: dict[str, ImageDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """List and check the samples and build the manifest; a second call does nothing.

        Args:
            stage: Unused: all splits are listed at once.
        """
        if self._manifest is not None:
            return
        splits = self.source.load()
        refuse_unusable(splits)
        pool = Pool(splits)
        self._places = pool.places
        self._manifest = self.plan.apply(pool, None if self.previous is None else Manifest.read(self.previous))
        refuse_unlearnable(self.classes, self._manifest.rows("train")["label"])
        if self.test_split == "val":
            log.warning("the data set has no test split: what is reported as test is the validation split")

    @property
    def manifest(self) -> Manifest:
        """The samples of the run.

        Raises:
            RuntimeError: `setup()` has not run.
        """
        if self._manifest is None:
            raise RuntimeError("call setup() before asking for samples or classes")
        return self._manifest

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
        mean, std = value
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"`normalization` must be three means and three positive deviations, got {value}")
        self._normalization = (tuple(mean), tuple(std))
        self._evaluated = {}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, augmented training batches of this process, or sweeps over fixed ones.

        Returns:
            A loader; if it shuffles, its position in the epoch is stored in checkpoints.

        Raises:
            ValueError: The batch size does not fit the number of processes or of samples.
        """
        if self.sweeps:
            return self._evaluation_loader("train", self.sweeps)
        world = World.find(self.trainer)
        batch_size = world.share_batch(self.batch_size)
        data = self._evaluation_set("train")
        if getattr(self.training_transform, "random", True):
            data = ImageDataset(data.records, self.training_transform, self.normalization, self.seed)
        share = {"rank": world.rank, "world_size": world.size, "batch_size": batch_size}
        sampler = TrainingSampler(len(data), self.seed, drop_last=self.drop_last, **share)
        if not len(sampler):
            raise ValueError(
                f"data.drop_last=true leaves no training batch: {len(data)} samples are fewer than "
                f"data.batch_size={self.batch_size}; set data.drop_last=false"
            )
        return TrainingLoader(
            data, sampler, batch_size=batch_size, **loader_options(world, self.num_workers, self.image_size)
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Validation batches of this process, in order; the sizes of the shares may differ.

        Returns:
            A loader, or an empty list when no sample is held out.
        """
        return self._evaluation_loader("val") if len(self.manifest.rows("val")) else []

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Test batches of this process, in order; validation batches where the data set has no test split.

        Returns:
            A loader, or an empty list when there is neither.
        """
        return self._evaluation_loader("test") if self.test_split == "test" else self.val_dataloader()

    def fixed_train_dataloader(self) -> DataLoader[Batch]:
        """Training batches of this process, in order, as they would be evaluated: every sample exactly once.

        Returns:
            A loader; the sizes of the shares may differ.
        """
        return self._evaluation_loader("train")

    def view_dataloader(self, split: str, view: View) -> DataLoader[Batch]:
        """Batches of this process, in order, as another network would evaluate them.

        Args:
            split: train, val or test.
            view: Size and normalization of that network's images.

        Returns:
            A loader; the sizes of the shares may differ.
        """
        transform = NoAugmentation(view.image_size, view.crop_fraction)
        data = ImageDataset(self._records(split), transform, (view.mean, view.std), self.seed)
        return self._loader_of(data, size=view.image_size)

    def _evaluation_loader(self, split: str, sweeps: int = 0) -> DataLoader[Batch]:
        return self._loader_of(self._evaluation_set(split), sweeps)

    def _loader_of(self, data: ImageDataset, sweeps: int = 0, size: int | None = None) -> DataLoader[Batch]:
        world = World.find(self.trainer)
        share = {"rank": world.rank, "world_size": world.size, "batch_size": -(-self.eval_batch_size // world.size)}
        sampler = SweepSampler(len(data), sweeps, **share) if sweeps else UnpaddedSampler(len(data), **share)
        options = {"batch_sampler": sampler, **loader_options(world, self.num_workers, size or self.image_size)}
        return DataLoader(data, **options)  # type: ignore[arg-type]  # a map of Batch

    def _evaluation_set(self, split: str) -> ImageDataset:
        if split not in self._evaluated:
            self._evaluated[split] = ImageDataset(
                self._records(split), self.evaluation_transform, self.normalization, self.seed, cache=self.cache_images
            )
        return self._evaluated[split]

    def _records(self, split: str) -> list[Record]:
        rows = self.manifest.rows(split)
        columns = zip(rows["path"], rows["label"], rows["index"], strict=True)
        return [Record(*self._places[path], int(label), int(index)) for path, label, index in columns]
