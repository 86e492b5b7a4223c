"""Your own images: one folder per class."""

import os
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from lqf_lightning.data.images import FileImages
from lqf_lightning.data.option import check_option
from lqf_lightning.data.selection import choose_fraction_per_class, draw_lots
from lqf_lightning.data.source import Samples, Source
from lqf_lightning.data.stream import UNLABELED

_SPLITS = {
    "train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",), "unlabeled": ("unlabeled",)
}  # fmt: skip
_LAYOUT = "Expected <root>/train/<class>/<image> (val and test beside train are optional) or <root>/<class>/<image>"


class FolderSource(Source):
    """Images in the layout of torchvision's `ImageFolder`, with or without folders for splits.

    `root/train`, and optionally `root/val` (or `valid`, `validation`) and `root/test`, each with one folder per class.
    Or class folders directly in `root`: then a test split is drawn, the same one every time. With either layout,
    `root/unlabeled` may hold training images of no known class, directly or in folders of any names. Hidden files and
    folders and files that are not images are passed over.

    Args:
        root: The folder.
        test_fraction: Share of every class to draw for testing when there are no folders for splits.
        split_seed: Decides which images are drawn.
    """

    def __init__(self, root: str | Path, test_fraction: float = 0.2, split_seed: int = 0) -> None:
        valid = 0 < test_fraction < 1
        check_option("source.test_fraction", test_fraction, valid, "above 0 and below 1", 0.2)
        self.root = Path(root).expanduser()
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def load(self) -> dict[str, Samples]:
        """List the images.

        Returns:
            Samples under `train`, and under `val`, `test` and `unlabeled` where there are any.

        Raises:
            FileNotFoundError: The folder does not exist or has no images.
            ValueError: The layout is not one of the two.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"no folder {self.root.absolute()}. {_LAYOUT}; set data.source.root=/path/to/images"
            )
        folders = {entry.name.lower(): entry.name for entry in self.root.iterdir() if _is_visible_folder(entry)}
        found = {split: [folders[n] for n in names if n in folders] for split, names in _SPLITS.items()}
        for split, names in found.items():
            if len(names) > 1:
                raise ValueError(f"{self.root} has several folders for split {split}: {', '.join(names)}. Keep one.")
        unlabeled = self._scan_unlabeled(found.pop("unlabeled"))
        if found["train"]:
            return {split: self._scan(names[0]) for split, names in found.items() if names} | unlabeled
        if found["val"] or found["test"]:
            raise ValueError(f"{self.root} has {sorted(folders.values())} but no folder train. {_LAYOUT}.")
        return self._draw_test(self._scan("")) | unlabeled

    def _scan(self, folder: str) -> Samples:
        base = self.root / folder
        classes = sorted(entry.name for entry in base.iterdir() if _is_visible_folder(entry))
        if not folder:
            classes = [name for name in classes if name.lower() != "unlabeled"]
        if not classes:
            loose = sum(1 for entry in base.iterdir() if entry.suffix.lower() in IMG_EXTENSIONS)
            raise ValueError(
                f"{base} has no class folders" + (f" but {loose} images directly in it" if loose else "")
                + f". {_LAYOUT}; set data.source.root=/path/to/images"
            )  # fmt: skip
        listed = [
            (path, label) for label, name in enumerate(classes) for path in self._list(PurePosixPath(folder, name))
        ]
        if not listed:
            raise FileNotFoundError(self._no_images(base))
        paths, labels = zip(*listed, strict=True)
        return Samples(FileImages(self.root, paths), paths, labels, classes)

    def _scan_unlabeled(self, names: list[str]) -> dict[str, Samples]:
        if not names:
            return {}
        if not (paths := self._list(PurePosixPath(names[0]))):
            raise FileNotFoundError(f"{self._no_images(self.root / names[0])}, or remove {names[0]}")
        return {"unlabeled": Samples(FileImages(self.root, paths), paths, [UNLABELED] * len(paths), [])}

    def _list(self, folder: PurePosixPath) -> list[str]:
        paths = []
        for base, folders, files in os.walk(self.root / folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            relative = PurePosixPath(Path(base).relative_to(self.root))
            paths += [
                str(relative / name)
                for name in sorted(files)
                if not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS)
            ]
        return paths

    def _no_images(self, base: Path) -> str:
        kinds = Counter(path.suffix or "no extension" for path in base.rglob("*") if path.is_file())
        held = ", ".join(f"{count} files with {kind}" for kind, count in kinds.most_common(3)) or "no files"
        return (
            f"no images under {base}: its folders hold {held}. Supported are {' '.join(IMG_EXTENSIONS)}; set "
            "data.source.root=/path/to/images"
        )

    def _draw_test(self, samples: Samples) -> dict[str, Samples]:
        lots = draw_lots(samples.paths, self.split_seed, "test")
        test = choose_fraction_per_class(lots, samples.labels, self.test_fraction)
        train = np.setdiff1d(np.arange(len(samples.paths)), test)
        return {name: _take(samples, rows.tolist()) for name, rows in (("train", train), ("test", test))}


def _is_visible_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _take(samples: Samples, rows: list[int]) -> Samples:
    paths = [samples.paths[row] for row in rows]
    root = samples.images.root if isinstance(samples.images, FileImages) else ""
    return Samples(FileImages(root, paths), paths, [samples.labels[row] for row in rows], samples.classes)
