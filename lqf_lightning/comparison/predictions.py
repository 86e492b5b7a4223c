"""Answers of models on the samples of a run, each with images as it wants them."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from lqf_lightning.data import ImageDataModule
from lqf_lightning.progress import track
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, Reference, StoredPredictions
from lqf_lightning.teachers.ensemble import in_order_of

Network = FrozenTeacher | EnsembleTeacher


def predict(
    models: Sequence[Reference], data: ImageDataModule, splits: Sequence[str], device: torch.device
) -> list[StoredPredictions]:
    """Ask models for all samples of some splits.

    Images are decoded once for all networks that want them alike. Members of an ensemble, too, see images as they were
    trained to. Stored predictions are checked to cover the samples, and handed back.

    Args:
        models: Networks, or predictions that are known already.
        data: The data module, set up.
        splits: Names of splits.
        device: Where to compute.

    Returns:
        Predictions with all outputs, in the order of the models.
    """
    data.manifest.hash_contents()
    for model in models:
        if isinstance(model, StoredPredictions):
            for split in splits:
                rows = data.manifest.rows(split)
                model.check(rows["index"].tolist(), rows["sha"].tolist(), split)
    # A network that is compared with itself is one object, and is asked once.
    networks = list(dict.fromkeys(model for model in models if not isinstance(model, StoredPredictions)))
    parts: dict[Network, list[pd.DataFrame]] = {network: [] for network in networks}
    for split in splits:
        rows = data.manifest.rows(split)
        for network, outputs in _outputs(networks, data, split, device).items():
            parts[network].append(_table(rows, outputs, network.classes))
    answers = {
        network: StoredPredictions(pd.concat(parts[network]), network.classes, network.name) for network in parts
    }
    return [model if isinstance(model, StoredPredictions) else answers[model] for model in models]


def _outputs(
    networks: Sequence[Network], data: ImageDataModule, split: str, device: torch.device
) -> dict[Network, Tensor]:
    number = len(data.manifest.rows(split))
    sums = {network: torch.zeros(number, len(network.classes)) for network in networks}
    pairs = [(network, member) for network in networks for member in network.members]
    for view in dict.fromkeys(member.view for _, member in pairs):
        asked = [(network, member.to(device)) for network, member in pairs if member.view == view]
        start = 0
        for batch in track(data.view_dataloader(split, view), f"Predicting {split} images"):
            images = batch.input.to(device)
            stop = start + len(images)
            for network, member in asked:
                outputs = in_order_of(network.classes, member.classes, member(images))
                sums[network][start:stop] += outputs.float().cpu() / len(network.members)
            start = stop
    return sums


def _table(rows: pd.DataFrame, outputs: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    confidence = outputs.softmax(-1).amax(-1)
    prediction = [classes[position] for position in outputs.argmax(-1).tolist()]
    table = rows[["index", "split", "sha"]].reset_index(drop=True)
    return table.assign(prediction=prediction, confidence=confidence.numpy(), logits=list(outputs.numpy()))
