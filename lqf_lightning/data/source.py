"""What a data set has to provide to be trained on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lqf_lightning.data.images import Images


@dataclass(frozen=True)
class Samples:
    """One split of a data set, before any option is applied.

    Attributes:
        images: The pixels.
        paths: One name per image that stays the same from run to run and is unique in the whole data set.
        labels: One position in `classes` per image, or -1 for images of the split `unlabeled`.
        classes: Names of the classes of this split; none for `unlabeled`.
    """

    images: Images
    paths: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]


class Source(ABC):
    """A data set on this machine, or one that can be fetched.

    Attributes:
        in_memory: Whether the images are in memory, so that worker processes would cost more than they save.
    """

    in_memory: bool = False

    @abstractmethod
    def load(self) -> dict[str, Samples]:
        """List the samples, fetching them first where needed; called on every process.

        Returns:
            Samples under `train`, and under `val` and `test` where the data set has such a split. More training
            images that nobody has labeled go under `unlabeled`.
        """
