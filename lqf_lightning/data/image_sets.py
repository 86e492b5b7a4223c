"""The samples of a run as data sets: as they are evaluated, and as they are trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lqf_lightning.data.augmentation import NoAugmentation
from lqf_lightning.data.copies import CopiedDataset, FixedDataset
from lqf_lightning.data.dataset import ImageDataset, Normalization, Record
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.pool import Pool
from lqf_lightning.data.seeding import mix_seed
from lqf_lightning.data.stream import ViewsFactory
from lqf_lightning.teachers import View


@dataclass(frozen=True)
class ImageSets:
    """Builds data sets, and keeps those that are evaluated again and again.

    Attributes:
        pool: The images.
        manifest: Which of them belong to which split.
        normalization: Mean and standard deviation per channel.
        evaluation: Transform of images that are evaluated.
        training: Transform of images that are trained on.
        seed: Decides augmentation.
        cache: Keep resized images in memory.
        copies: Samples that a training image stands for where they are fixed.
    """

    pool: Pool
    manifest: Manifest
    normalization: Normalization
    evaluation: NoAugmentation
    training: Callable[[Image.Image], Image.Image]
    seed: int
    cache: bool
    copies: int = 1
    _evaluated: dict[str, ImageDataset] = field(default_factory=dict)

    def evaluated(self, split: str) -> ImageDataset:
        """Samples as they are evaluated.

        Args:
            split: train, val, test, or "every": all labeled training samples, whether they are used or not.

        Returns:
            The data set, the same one every time.
        """
        if split not in self._evaluated:
            rows = self.manifest.labeled_rows() if split == "every" else self.manifest.rows(split)
            options: dict[str, Any] = {"seed": self.seed, "cache": self.cache}
            self._evaluated[split] = ImageDataset(
                self.pool.records(rows), self.evaluation, self.normalization, **options
            )
        return self._evaluated[split]

    @cached_property
    def fixed(self) -> FixedDataset:
        """Training samples that never change: as they are evaluated and, with copies, under fixed draws as well.

        A copy is drawn from (seed, index of the image, number of the copy): it is the same in every sweep, epoch,
        process and run.
        """
        images = self.evaluated("train")
        if self.copies == 1:
            return images
        known = (images.records, self.training, self.normalization)
        seeds = [mix_seed(self.seed, number) for number in range(1, self.copies)]
        drawn = [ImageDataset(*known, seed, cache=self.cache) for seed in seeds]
        return CopiedDataset(images, drawn, len(self.manifest))

    def chosen(self, indices: Tensor) -> ImageDataset:
        """Some training samples as they are evaluated.

        Args:
            indices: Of the samples (K,).

        Returns:
            The data set, in order of index.

        Raises:
            ValueError: One of them is no labeled training sample, or is gone.
        """
        rows, wanted = self.manifest.labeled_rows(), torch.unique(indices).tolist()
        if missing := sorted(set(wanted) - set(rows["index"])):
            raise ValueError(
                f"{len(missing)} of {len(wanted)} indices belong to no labeled training sample that is there; the "
                f"first is {missing[0]}. Expected some of those of the manifest with split=train and removed=false"
            )
        records = self.pool.records(rows[rows["index"].isin(wanted)])
        return ImageDataset(records, self.evaluation, self.normalization, self.seed)

    def labeled(self, views: ViewsFactory | None = None) -> ImageDataset:
        """Training samples with a label, as they are trained on.

        Args:
            views: Makes several views of each; None: one image.

        Returns:
            The data set.
        """
        fixed = self.evaluated("train")
        drawn = views is not None or getattr(self.training, "random", True)
        return self.trained(fixed.records, views) if drawn else fixed

    def everything(self, views: ViewsFactory | None = None, *, hidden: bool = False) -> ImageDataset:
        """All training samples, with or without a label, as they are trained on.

        Args:
            views: Makes several views of each; None: one image.
            hidden: Whether to hide all labels.

        Returns:
            The data set.
        """
        return self.trained(self.pool.records(self.manifest.training_rows(), hidden=hidden), views)

    def trained(self, records: Sequence[Record], views: ViewsFactory | None) -> ImageDataset:
        """Some samples as they are trained on.

        Args:
            records: The samples.
            views: Makes several views of each; None: one image.

        Returns:
            The data set.
        """
        transform: Any = self.training
        if views is not None:
            transform = views(size=self.evaluation.size, crop_fraction=self.evaluation.crop_fraction, weak=transform)
        return ImageDataset(records, transform, self.normalization, self.seed)


def viewed(records: Sequence[Record], view: View, seed: int) -> ImageDataset:
    """Samples as another network would evaluate them.

    Args:
        records: The samples.
        view: Size and normalization of that network's images.
        seed: That of the run.

    Returns:
        The data set.
    """
    return ImageDataset(records, NoAugmentation(view.image_size, view.crop_fraction), (view.mean, view.std), seed)
