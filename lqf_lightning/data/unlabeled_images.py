"""Training images of any data set, without their labels."""

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lqf_lightning.data.batch import Batch
from lqf_lightning.data.datamodule import ImageDataModule
from lqf_lightning.data.dataset import ImageDataset, Record
from lqf_lightning.data.loader import TrainingLoader, evaluation_loader
from lqf_lightning.data.option import check_option
from lqf_lightning.data.selection import choose_lowest, draw_lots
from lqf_lightning.data.training_loaders import TrainingLoaders
from lqf_lightning.data.world import World


class UnlabeledImages(LightningDataModule):
    """The training split of a data set, labeled or not, with every target hidden.

    Some of the images are held out for measuring, drawn by path and not by class, so that no label has a say in which.

    Args:
        data: The data set, set up, with the normalization of the network.
        held_out: Share of the images to hold out.
        statistics: Number of images at most that `statistics_dataloader` brings.
        seed: Decides which, and order and augmentation of the others.

    Attributes:
        train: Images to train on.
        held_out: The others.

    Raises:
        ValueError: `held_out` is out of range, or leaves nothing on one of the sides.
    """

    def __init__(self, data: ImageDataModule, *, held_out: float = 0.1, statistics: int = 1024, seed: int = 0) -> None:
        super().__init__()
        check_option("held_out", held_out, 0 < held_out < 1, "above 0 and below 1", 0.1, "images")
        check_option("statistics", statistics, statistics >= 2, "at least 2", 1024, "images")
        self.data, self.statistics, self.seed = data, statistics, seed
        self._sets = data._sets  # with their cache
        rows = data.manifest.training_rows()
        lots = draw_lots(rows["path"], seed, "held_out")
        # One image has no spread that an error could be relative to.
        chosen = choose_lowest(lots, max(2, round(held_out * len(rows))))
        # The rest is shuffled by the same lots, so that a prefix of it is a fair sample.
        rest = np.setdiff1d(np.arange(len(rows)), chosen)
        rest = rest[np.argsort(lots[rest], kind="stable")]
        if len(rest) < 2:
            raise ValueError(
                f"{len(rows)} training images with images.held_out={held_out} leave {len(rest)} to train on. Set "
                "images.held_out lower, or give more images"
            )
        self.held_out = self._sets.pool.records(rows.iloc[chosen], hidden=True)
        self.train = self._sets.pool.records(rows.iloc[rest], hidden=True)

    def train_dataloader(self) -> TrainingLoader:
        """Shuffled, augmented batches of this process, full ones only.

        Returns:
            A loader whose position in the epoch is stored in checkpoints.
        """
        data = self.data
        loaders = TrainingLoaders(self._world, data.batch_size, self.seed, data.num_workers, data.image_size)
        return loaders.all(self._sets.trained(self.train, None))

    def val_dataloader(self) -> DataLoader[Batch]:
        """The held-out images of this process, as they would be evaluated.

        Returns:
            A loader; the sizes of the shares may differ.
        """
        return self._evaluated(self.held_out)

    def statistics_dataloader(self) -> DataLoader[Batch]:
        """Some training images of this process, as they would be evaluated; in full batches, where there are any.

        Returns:
            A loader; the sizes of the shares may differ.
        """
        number, size = min(self.statistics, len(self.train)), self.data.eval_batch_size
        # A batch of one image may have no variance to normalize by.
        return self._evaluated(self.train[: number - number % size if number > size else number])

    @property
    def _world(self) -> World:
        return World.find(self.trainer)

    def _evaluated(self, records: list[Record]) -> DataLoader[Batch]:
        data = self.data
        images = ImageDataset(records, self._sets.evaluation, self._sets.normalization, self.seed)
        return evaluation_loader(images, self._world, data.eval_batch_size, data.num_workers, data.image_size)
