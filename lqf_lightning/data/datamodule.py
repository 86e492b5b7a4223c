"""From a source of images to the batches of one process."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lqf_lightning.data.augmentation import NoAugmentation
from lqf_lightning.data.batch import Batch
from lqf_lightning.data.copies import FixedDataset, checked_copies, refuse_ordinary_batches
from lqf_lightning.data.core import Part
from lqf_lightning.data.image_sets import ImageSets, viewed
from lqf_lightning.data.listed_samples import ListedSamples
from lqf_lightning.data.loader import evaluation_loader
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.plan import Plan
from lqf_lightning.data.pool import Pool
from lqf_lightning.data.refusals import refuse_sizes, refuse_unusable, refuse_workers
from lqf_lightning.data.sample_file import read_weights
from lqf_lightning.data.settled_choice import emptied_classes
from lqf_lightning.data.source import Source
from lqf_lightning.data.stream import Stream
from lqf_lightning.data.training_loaders import TrainingLoaders
from lqf_lightning.data.world import World
from lqf_lightning.teachers import View

log = logging.getLogger(__name__)


class ImageDataModule(ListedSamples):
    """Image classification data with one index per sample.

    `setup()` lists the samples, refuses what cannot be trained on and builds the manifest. The loaders need the
    backbone's `normalization`, and a trainer with `use_distributed_sampler=False`: they share out samples themselves.

    Args:
        source: Where the images come from.
        image_size: Side of the square that the network sees, in pixels.
        crop_fraction: Share of the shorter side that evaluation keeps.
        augmentation: Called with `size` and `crop_fraction`, gives the transform of training images; None: none.
        copies: Samples that a training image stands for where a method sweeps over fixed ones, at as many times the
            price: itself as evaluated, and the others under draws of `augmentation` that never change.
        batch_size: Samples per training step of all processes together.
        eval_batch_size: Samples per evaluation step of all processes together; None: as in training.
        drop_last: Leave out the training samples that do not fill a batch.
        num_workers: Worker processes per loader; None: 0 for images in memory, else the cores of this process up to 8.
        val_fraction: Share of every class held out of training when the data set has no validation split.
        split_seed: Decides which.
        shots: Training images per class; None: all.
        subset_ratio: Share of the training images; a smaller share is a subset of a larger one.
        subset_seed: Decides which, for both.
        subset: File of the training images to use, by index or path (Parquet, CSV, JSON or text); None: all.
        core: Training images that will never have to be forgotten: ``{fraction: 0.5, seed: 0}`` of every class, or what
            `Cohort.parse` takes. What `manifest` says of its images stands. None: nothing is known of that.
        part: Train on the "core", on the "user" data, which are all others, or on "all".
        weights: File of how much training images count, 1 where absent (Parquet, CSV or JSON). The loss stays divided
            by the number of images, those of weight 0 included. None: all count alike.
        label_noise: Share of the labeled training images that get the label of another class.
        noise_seed: Decides which, and which label.
        label_fraction: Share of every class, at least one image, whose labels are used; smaller ones are subsets.
        labels_per_class: The same as a number of training images per class; None: `label_fraction` decides.
        label_seed: Decides which, for both.
        cache_images: Keep resized images in memory where nothing is drawn anew, copies included.
        manifest: Manifest of an earlier run; its samples keep index, split and label.
        seed: Decides order and augmentation.

    Attributes:
        sweeps: How often a training epoch goes through `fixed_train_dataloader`; 0: `stream` decides.
        stream: What the method wants to be trained on.
        sample_weights: How much samples count, by index (copies * len(manifest),), once set up; None without `weights`.
        seen_by_weights: Training images whose labels the starting weights have learned from, body or head, by index
            (len(manifest),), bool, as far as is known; None: none.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int = 224,
        crop_fraction: float = 0.875,
        augmentation: Callable[..., Callable[[Image.Image], Image.Image]] | None = None,
        copies: int = 1,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        num_workers: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        shots: int | None = None,
        subset_ratio: float = 1.0,
        subset_seed: int = 0,
        subset: str | Path | None = None,
        core: Any = None,
        part: Part = "all",
        weights: str | Path | None = None,
        label_noise: float = 0.0,
        noise_seed: int = 0,
        label_fraction: float = 1.0,
        labels_per_class: int | None = None,
        label_seed: int = 0,
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
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, at_once, drop_last
        self.num_workers = 0 if num_workers is None and (source.in_memory or cache_images) else num_workers
        self.cache_images = cache_images
        self.previous, self.seed = manifest, seed
        labels = (label_noise, noise_seed, label_fraction, labels_per_class, label_seed)
        self.plan = Plan(val_fraction, split_seed, shots, subset_ratio, subset_seed, *labels, subset, core, part)
        self.weights, self.sample_weights = weights, cast("Tensor | None", None)
        self.seen_by_weights: Tensor | None = None
        self.evaluation_transform = NoAugmentation(size=image_size, crop_fraction=crop_fraction)
        self.training_transform = (augmentation or NoAugmentation)(size=image_size, crop_fraction=crop_fraction)
        self.copies = checked_copies(copies, self.training_transform)
        self.sweeps, self.stream = 0, Stream()
        self._pool: Pool  # with the manifest

    def setup(self, stage: str | None = None) -> None:
        """List and check the samples and build the manifest; a second call does nothing.

        Args:
            stage: "fit" refuses a method that copies of images are not for; all splits are listed at once.
        """
        if stage == "fit" and self.trainer is not None:
            refuse_ordinary_batches(self.copies, getattr(self.trainer.lightning_module, "sweeps", 0))
        if self._manifest is not None:
            return
        previous = None if self.previous is None else Manifest.read(self.previous)
        splits = self.source.load()
        refuse_unusable(splits, emptied_classes(previous))
        self._pool = Pool(splits)
        self._manifest = self.plan.apply(self._pool, previous)
        self.sample_weights = None if self.weights is None else read_weights(self.weights, self._manifest, self.copies)
        if self.test_split == "val":
            log.warning("the data set has no test split: what is reported as test is the validation split")

    def forget(self, indices: Tensor) -> None:
        """Replace training samples by tombstones, here and not on disk: every loader made from now on is without them.

        The others keep their indices. Written out, the manifest lets a later run go on without these samples too.

        Args:
            indices: Of the samples (K,).
        """
        self._manifest, self._built = self.manifest.forget(indices), None

    def train_dataloader(self) -> DataLoader[Batch] | CombinedLoader:
        """Shuffled, augmented training batches of this process as `stream` says, or sweeps over fixed ones.

        Returns:
            A loader; if it shuffles, its position in the epoch is stored in checkpoints. A stream of "both" gives
            dictionaries of two batches.
        """
        if self.sweeps:
            return self._loader_of(self._sets.fixed, self.sweeps)
        refuse_ordinary_batches(self.copies, self.sweeps)
        world, stream = World.find(self.trainer), self.stream
        loaders = TrainingLoaders(world, self.batch_size, self.seed, self.num_workers, self.image_size)
        if stream.samples == "labeled":
            return loaders.labeled(self._sets.labeled(stream.views), self.drop_last)
        everything = self._sets.everything(stream.views, hidden=stream.samples == "both")
        if stream.samples == "all":
            return loaders.all(everything)
        return loaders.both(self._sets.labeled(), everything, stream.unlabeled_ratio)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Validation batches of this process, in order; the sizes of the shares may differ.

        Returns:
            A loader, or an empty list when no sample is held out.
        """
        return self._loader_of(self._sets.evaluated("val")) if len(self.manifest.rows("val")) else []

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Test batches of this process, in order; validation batches where the data set has no test split.

        Returns:
            A loader, or an empty list when there is neither.
        """
        return self._loader_of(self._sets.evaluated("test")) if self.test_split == "test" else self.val_dataloader()

    def fixed_train_dataloader(self) -> DataLoader[Batch]:
        """Training batches of this process, in order, as they would be evaluated: every sample exactly once.

        Returns:
            A loader, of all copies of the images; the sizes of the shares may differ.
        """
        return self._loader_of(self._sets.fixed)

    def every_train_dataloader(self) -> DataLoader[Batch]:
        """The same for all labeled training samples, those that `subset`, `shots` or `subset_ratio` leave out included.

        Returns:
            A loader; the sizes of the shares may differ.
        """
        return self._loader_of(self._sets.evaluated("every"))

    def chosen_dataloader(self, indices: Tensor) -> DataLoader[Batch]:
        """The same for some labeled training samples, in order of index.

        Args:
            indices: Of the samples (K,), used or not, but not forgotten or gone.

        Returns:
            A loader; the sizes of the shares may differ.
        """
        return self._loader_of(self._sets.chosen(indices))

    def view_dataloader(self, split: str, view: View) -> DataLoader[Batch]:
        """Batches of this process, in order, as another network would evaluate them.

        Args:
            split: train, val or test.
            view: Size and normalization of that network's images.

        Returns:
            A loader; the sizes of the shares may differ.
        """
        data = viewed(self._pool.records(self.manifest.rows(split)), view, self.seed)
        return self._loader_of(data, size=view.image_size)

    @property
    def _sets(self) -> ImageSets:
        if self._built is None:
            known = (self._pool, self.manifest, self.normalization, self.evaluation_transform, self.training_transform)
            self._built = ImageSets(*known, self.seed, self.cache_images, self.copies)
        return self._built

    def _loader_of(self, data: FixedDataset, sweeps: int = 0, size: int | None = None) -> DataLoader[Batch]:
        world, size = World.find(self.trainer), size or self.image_size
        return evaluation_loader(data, world, self.eval_batch_size, self.num_workers, size, sweeps)
