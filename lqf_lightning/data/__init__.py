"""Image data sets whose samples keep one index through subsets, shuffles, processes and resumed runs."""

from lqf_lightning.data.augmentation import Crop as Crop
from lqf_lightning.data.augmentation import CropFlip as CropFlip
from lqf_lightning.data.augmentation import NoAugmentation as NoAugmentation
from lqf_lightning.data.augmentation import RandAugment as RandAugment
from lqf_lightning.data.augmentation import Shift as Shift
from lqf_lightning.data.batch import Batch as Batch
from lqf_lightning.data.cohort import Cohort as Cohort
from lqf_lightning.data.cycling_sampler import CyclingSampler as CyclingSampler
from lqf_lightning.data.datamodule import ImageDataModule as ImageDataModule
from lqf_lightning.data.dataset import ImageDataset as ImageDataset
from lqf_lightning.data.digits_source import DigitsSource as DigitsSource
from lqf_lightning.data.folder_source import FolderSource as FolderSource
from lqf_lightning.data.images import ArrayImages as ArrayImages
from lqf_lightning.data.images import FileImages as FileImages
from lqf_lightning.data.manifest import Manifest as Manifest
from lqf_lightning.data.sampler import TrainingSampler as TrainingSampler
from lqf_lightning.data.sampler import UnpaddedSampler as UnpaddedSampler
from lqf_lightning.data.source import Samples as Samples
from lqf_lightning.data.source import Source as Source
from lqf_lightning.data.stream import UNLABELED as UNLABELED
from lqf_lightning.data.stream import Stream as Stream
from lqf_lightning.data.stream import ViewsFactory as ViewsFactory
from lqf_lightning.data.torchvision_source import TorchvisionSource as TorchvisionSource
from lqf_lightning.data.views import TwoViews as TwoViews
from lqf_lightning.data.views import WeakStrong as WeakStrong
