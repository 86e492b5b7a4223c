"""The training batches of one process, for every kind of stream."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import CombinedLoader

from lqf_lightning.data.cycling_sampler import CyclingSampler
from lqf_lightning.data.dataset import ImageDataset
from lqf_lightning.data.loader import TrainingLoader, loader_options
from lqf_lightning.data.sampler import TrainingSampler
from lqf_lightning.data.world import World


@dataclass(frozen=True)
class TrainingLoaders:
    """Builds shuffled training batches whose position in the epoch is stored in checkpoints.

    Attributes:
        world: This process among the others.
        batch_size: Samples per step of all processes together.
        seed: Decides the order.
        num_workers: Worker processes per loader; None: the cores of this process, up to 8.
        image_size: Side of the images in pixels.
    """

    world: World
    batch_size: int
    seed: int
    num_workers: int | None
    image_size: int

    def labeled(self, data: ImageDataset, drop_last: bool) -> TrainingLoader:
        """Every sample once per epoch.

        Args:
            data: The labeled samples.
            drop_last: Leave out the samples that do not fill a batch.

        Returns:
            The loader.

        Raises:
            ValueError: The batch size does not fit the number of processes or of samples.
        """
        loader = self._once(data, 1, drop_last)
        if not len(loader):
            raise ValueError(
                f"data.drop_last=true leaves no training batch: {len(data)} samples are fewer than "
                f"data.batch_size={self.batch_size}; set data.drop_last=false"
            )
        return loader

    def all(self, data: ImageDataset, ratio: int = 1) -> TrainingLoader:
        """Every sample once per epoch, in full batches only.

        Args:
            data: All training samples.
            ratio: Size of a step in batches.

        Returns:
            The loader.

        Raises:
            ValueError: The batch size does not fit the number of processes, or there is no full step.
        """
        loader = self._once(data, ratio, drop_last=True)
        if not len(loader):
            wanted = f"data.batch_size={self.batch_size}"
            wanted = wanted if ratio == 1 else f"method.unlabeled_ratio={ratio} times {wanted}"
            raise ValueError(
                f"there is no training step: {len(data)} training images, labeled or not, are fewer than {wanted}; "
                f"set {self._fitting(len(data), ratio)}"
            )
        return loader

    def both(self, labeled: ImageDataset, unlabeled: ImageDataset, ratio: int) -> CombinedLoader:
        """A pass over all samples without labels, beside labeled ones that repeat in fresh orders.

        Args:
            labeled: The labeled samples.
            unlabeled: All training samples, without their labels.
            ratio: Samples without label per labeled one in a step.

        Returns:
            A loader of dictionaries of two batches, `labeled` and `unlabeled`.
        """
        passes = self.all(unlabeled, ratio)
        share = self._share(1)
        sampler = CyclingSampler(len(labeled), len(passes) * share["batch_size"], self.seed, **share)
        cycle = self._loader(labeled, sampler)
        return CombinedLoader({"labeled": cycle, "unlabeled": passes}, mode="min_size")

    def _once(self, data: ImageDataset, ratio: int, drop_last: bool) -> TrainingLoader:
        return self._loader(data, TrainingSampler(len(data), self.seed, drop_last=drop_last, **self._share(ratio)))

    def _loader(self, data: ImageDataset, sampler: TrainingSampler | CyclingSampler) -> TrainingLoader:
        views = getattr(data.transform, "views", 0)
        options = loader_options(self.world, self.num_workers, self.image_size, views)
        return TrainingLoader(data, sampler, batch_size=sampler.batch_size, **options)

    def _share(self, ratio: int) -> dict[str, Any]:
        batch_size = ratio * self.world.share_batch(self.batch_size)
        return {"rank": self.world.rank, "world_size": self.world.size, "batch_size": batch_size}

    def _fitting(self, samples: int, ratio: int) -> str:
        largest = samples // ratio // self.world.size * self.world.size
        choices = [f"data.batch_size={largest} or lower"] if largest else []
        choices += [f"method.unlabeled_ratio={samples // self.batch_size}"] if samples >= self.batch_size else []
        return " or ".join(choices) or "data.subset_ratio or data.shots higher"
