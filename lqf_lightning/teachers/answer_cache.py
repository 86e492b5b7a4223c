"""Outputs of networks, kept on disk until something that decides them changes."""

import json
import logging
from collections.abc import Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from lqf_lightning.teachers.frozen import FrozenTeacher
from lqf_lightning.teachers.stored import StoredPredictions

log = logging.getLogger(__name__)
_ROUNDING = 1e-5  # of probabilities, between processors
_DECIDERS = ("lqf-lightning", "torch", "torchvision", "timm", "pillow")  # decode, resize and compute


class AnswerCache:
    """A folder of Parquet files, one for every network and set of images, each readable as `StoredPredictions`.

    A file's name is a hash of all that decides its content: the network (weights, architecture, classes, view), index
    and content hash of every image, in order, the kind of device, and the versions of the libraries that decode, resize
    and compute. Whatever changes gets a file of its own, and nothing is ever out of date. Files may be deleted.

    Several processes may use one folder: a file appears under its name only when it is complete.

    Args:
        folder: Where the files are; made when the first is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def file(self, teacher: FrozenTeacher, index: Sequence[int], sha: Sequence[str], device: str = "cpu") -> Path:
        """Name the file of a network's outputs for images.

        Args:
            teacher: The network.
            index: Rows of the manifest (N,), ascending.
            sha: Content hashes of these images (N,).
            device: Kind of device that computes; rounding differs between them.

        Returns:
            The file, which may not exist.
        """
        # Activations, strides and the like are no weights: they show in the printed network only.
        network = [teacher.fingerprint, repr(teacher.view), teacher.classes, repr(teacher.model)]
        content = [network, [int(i) for i in index], list(sha), device, [version(name) for name in _DECIDERS]]
        return self.folder / f"{blake2b(json.dumps(content).encode(), digest_size=20).hexdigest()}.parquet"

    def find(
        self, teacher: FrozenTeacher, index: Sequence[int], sha: Sequence[str], device: str = "cpu"
    ) -> Tensor | None:
        """Read a network's outputs for images.

        Args:
            teacher: The network.
            index: Rows of the manifest (N,), ascending.
            sha: Content hashes of these images (N,).
            device: Kind of device that computes.

        Returns:
            Outputs (N, C), single precision; None where there is no file. A damaged file is reported and passed over.
        """
        file = self.file(teacher, index, sha, device)
        if not file.exists():
            return None
        try:
            outputs = _outputs(StoredPredictions.read(file), teacher.classes, index)
        except (ValueError, TypeError, KeyError, OSError, pa.ArrowException) as error:
            log.warning("%s is damaged (%s): predictions are computed afresh", file, str(error).partition("\n")[0])
            return None
        return outputs

    def keep(
        self,
        teacher: FrozenTeacher,
        index: Sequence[int],
        sha: Sequence[str],
        outputs: Tensor,
        split: str,
        device: str = "cpu",
    ) -> None:
        """Write a network's outputs for images; a folder that cannot be written to is reported and passed over.

        Args:
            teacher: The network.
            index: Rows of the manifest (N,), ascending.
            sha: Content hashes of these images (N,).
            outputs: Outputs (N, C).
            split: What to call the images in the file.
            device: Kind of device that computed.
        """
        file = self.file(teacher, index, sha, device)
        stored = stored_outputs(teacher.classes, teacher.name, index, outputs, logits=True)
        stored.table["sha"], stored.table["split"] = list(sha), split
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self.folder, prefix=".partial_") as own:  # others may write the same file now
                stored.write(Path(own) / file.name)
                (Path(own) / file.name).replace(file)
        except OSError as error:
            log.warning("predictions of %s cannot be kept in %s (%s)", teacher.name, self.folder, error)


def stored_outputs(
    classes: Sequence[str], name: str, index: Sequence[int], outputs: Tensor, *, logits: bool
) -> StoredPredictions:
    """Tell outputs as predictions.

    Args:
        classes: Class names, in the order of the outputs.
        name: What to call the model.
        index: Rows of the manifest (N,), ascending.
        outputs: Outputs (N, C).
        logits: Whether to keep them, beside the best and its probability.

    Returns:
        The predictions.

    Example:
        >>> import torch
        >>> stored = stored_outputs(["ant", "bee"], "old", [4, 7], torch.tensor([[0.0, 3.0], [1.0, 0.0]]), logits=False)
        >>> position, confidence = stored.predictions(torch.tensor([7, 4]))
        >>> position.tolist(), [round(value, 3) for value in confidence.tolist()]
        ([0, 1], [0.731, 0.953])
    """
    table = pd.DataFrame({"index": [int(i) for i in index]})
    table["prediction"] = [classes[position] for position in outputs.argmax(-1).tolist()]
    table["confidence"] = outputs.float().softmax(-1).amax(-1).numpy()
    if logits:
        table["logits"] = list(outputs.float().numpy())
    return StoredPredictions(table, classes, name)


def _outputs(stored: StoredPredictions, classes: Sequence[str], index: Sequence[int]) -> Tensor:
    wanted = torch.tensor([int(i) for i in index], dtype=torch.int64)
    if stored.classes != list(classes) or stored.table["index"].tolist() != wanted.tolist():
        raise ValueError("it holds other classes or images than its name says")
    outputs = stored.look_up(wanted)
    # Parquet has no checksum of its own, but the other columns can be told from the outputs.
    told = stored_outputs(classes, stored.name, index, outputs, logits=False).table
    gap = np.abs(told["confidence"] - stored.table["confidence"]).max() if len(told) else 0.0
    if told["prediction"].tolist() != stored.table["prediction"].tolist() or gap > _ROUNDING:
        raise ValueError("its predictions are not those of its outputs")
    return outputs
