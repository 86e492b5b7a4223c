"""Public data sets in the files that torchvision knows, downloaded when missing."""

import difflib
import tarfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torchvision import datasets

from lqf_lightning.data.images import ArrayImages, FileImages
from lqf_lightning.data.source import Samples, Source


@dataclass(frozen=True)
class _Entry:
    """How torchvision splits one data set, where its files are, and whether its images come as one array."""

    dataset: str
    splits: Mapping[str, Mapping[str, Any]]
    files: str
    in_memory: bool = False
    downloadable: bool = True


_TRAIN_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TWO = {name: {"split": name} for name in ("train", "test")}
_THREE = {name: {"split": name} for name in ("train", "val", "test")}
_KNOWN = {
    "cifar10": _Entry("CIFAR10", _TRAIN_FLAG, "cifar-10-batches-py/", in_memory=True),
    "cifar100": _Entry("CIFAR100", _TRAIN_FLAG, "cifar-100-python/", in_memory=True),
    "fashion_mnist": _Entry("FashionMNIST", _TRAIN_FLAG, "FashionMNIST/raw/", in_memory=True),
    "flowers102": _Entry("Flowers102", _THREE, "flowers-102/jpg/, imagelabels.mat and setid.mat"),
    "stanford_cars": _Entry(
        "StanfordCars",
        _TWO,
        "stanford_cars/cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat",
        downloadable=False,
    ),
    "fgvc_aircraft": _Entry("FGVCAircraft", _THREE, "fgvc-aircraft-2013b/data/"),
    "dtd": _Entry("DTD", _THREE, "dtd/dtd/images/ and labels/"),
    "oxford_pets": _Entry(
        "OxfordIIITPet",
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        "oxford-iiit-pet/images/ and annotations/",
    ),
    "food101": _Entry("Food101", _TWO, "food-101/images/ and meta/"),
}


class TorchvisionSource(Source):
    """One of the public data sets, with its official splits.

    A file lock beside the data keeps processes that start together from downloading twice.

    Args:
        name: cifar10, cifar100, fashion_mnist, flowers102, stanford_cars, fgvc_aircraft, dtd, oxford_pets or food101.
        root: Folder that holds, or will hold, the files of all these sets.
        download: Fetch missing files.

    Raises:
        ValueError: There is no such data set.
    """

    def __init__(self, name: str, root: str | Path, download: bool = True) -> None:
        if name not in _KNOWN:
            nearest = difflib.get_close_matches(name.lower().replace("-", "_"), _KNOWN, 1, 0.4)
            hint = f"did you mean data.source.name={nearest[0]}? " if nearest else ""
            raise ValueError(f"no data set named {name!r}; {hint}Known are {', '.join(_KNOWN)}")
        self.name = name
        self.root = Path(root).expanduser()
        self.download = download
        self.entry = _KNOWN[name]
        self.in_memory = self.entry.in_memory

    def load(self) -> dict[str, Samples]:
        """Open the data set, downloading it first if it is missing.

        Missing files that cannot be had raise `FileNotFoundError`, a missing SciPy `ModuleNotFoundError`.

        Returns:
            Samples under `train` and `test`, and under `val` where the set has an official validation split.
        """
        with self._lock():
            opened = {split: self._open(options) for split, options in self.entry.splits.items()}
        samples = {split: self._samples(split, dataset) for split, dataset in opened.items()}
        for part in samples.values():
            self._refuse_missing(part)
        return samples

    def _lock(self) -> Any:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / f".{self.name}.lock").touch()
        except OSError:  # a folder that cannot be written cannot be half downloaded either
            return nullcontext()
        return FileLock(self.root / f".{self.name}.lock")

    def _open(self, options: Mapping[str, Any]) -> Any:
        build: Callable[..., Any] = getattr(datasets, self.entry.dataset)
        try:
            return build(self.root, download=False, **options)
        except RuntimeError as error:
            if "scipy" in str(error).lower():
                raise self._needs_scipy() from error
            if not (self.download and self.entry.downloadable):
                raise FileNotFoundError(self._explain(str(error))) from error
        except ModuleNotFoundError as error:
            raise self._needs_scipy() from error
        try:
            return build(self.root, download=True, **options)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:  # URLError is an OSError
            raise FileNotFoundError(self._explain(f"the download failed: {' '.join(str(error).split())}")) from error

    def _explain(self, cause: str) -> str:
        advice = f"Put the files in {self.root.absolute()}/{self.entry.files}, or set data.source.root=/path/to/data"
        if not self.entry.downloadable:
            return f"{self.name} is not in {self.root.absolute()} and can no longer be downloaded. {advice}"
        if not self.download:
            return f"{self.name}: {cause}. {advice}, or set data.source.download=true"
        return f"{self.name} is not in {self.root.absolute()} and {cause}. {advice}"

    def _needs_scipy(self) -> ModuleNotFoundError:
        message = f"{self.name} keeps its labels in MATLAB files. Run: pip install scipy"
        return ModuleNotFoundError(message, name="scipy")

    def _samples(self, split: str, dataset: Any) -> Samples:
        if self.in_memory:
            labels = [int(label) for label in dataset.targets]
            paths = [f"{split}/{position}" for position in range(len(labels))]
            images = ArrayImages(np.asarray(dataset.data), f"{self.name} {split}")
            return Samples(images, paths, labels, dataset.classes)
        files, labels = _list_files(dataset)
        paths = [Path(file).relative_to(self.root).as_posix() for file in files]
        return Samples(FileImages(self.root, paths), paths, labels, dataset.classes)

    def _refuse_missing(self, samples: Samples) -> None:
        if not isinstance(samples.images, FileImages):
            return
        missing = [path for path in samples.paths if not (self.root / path).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(samples.paths)} files of {self.name} are missing, the first is "
                f"{self.root / missing[0]}. An interrupted download leaves such gaps: delete "
                f"{self.root / missing[0].split('/')[0]} and start again."
            )


def _list_files(dataset: Any) -> tuple[list[str], list[int]]:
    # without decoding: torchvision's sets with a `loader` hand it the path
    if hasattr(dataset, "loader"):
        dataset.loader = str
        listed = [dataset[position] for position in range(len(dataset))]
        return [file for file, _ in listed], [int(label) for _, label in listed]
    return [str(file) for file in dataset._images], list(dataset._labels)  # OxfordIIITPet has no loader
