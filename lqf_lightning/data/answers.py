"""What a model in use says about a split, as its own evaluation would find."""

from pathlib import Path

import torch
from torch import Tensor

from lqf_lightning.data.datamodule import ImageDataModule
from lqf_lightning.linear import Reducer, current_reducer
from lqf_lightning.progress import track
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, Reference, StoredPredictions
from lqf_lightning.teachers.answer_cache import AnswerCache, stored_outputs
from lqf_lightning.teachers.ensemble import in_order_of


def answers(
    data: ImageDataModule,
    reference: Reference,
    split: str,
    device: torch.device | str = "cpu",
    cache_dir: str | Path | None = None,
) -> StoredPredictions:
    """Predict a split with a model in use, or make sure that its stored predictions are those of this split.

    Every member of an ensemble sees the images in its own size, crop and normalization; then outputs are averaged.
    Every process computes its share and gets all predictions. All processes have to call this together.

    Args:
        data: The data, set up.
        reference: The model, which is moved to the device and back, or its predictions.
        split: train, val or test.
        device: Where to compute.
        cache_dir: Folder that keeps outputs for the next run, read and written by the first process; None: none is.

    Returns:
        Predictions and their probabilities for all samples of the split, by index.
    """
    reducer, device = current_reducer(), torch.device(device)
    if isinstance(reference, StoredPredictions):
        _check(data, reference, split, reducer, device)
        return reference
    cache = None if cache_dir is None else AnswerCache(cache_dir)
    parts = []
    for member in reference.members:
        outputs = _member_outputs(data, member, split, device, cache)
        parts.append(in_order_of(reference.classes, member.classes, outputs))
    # As the ensemble itself would; one member is taken as it is.
    outputs = torch.stack(parts).mean(0) if isinstance(reference, EnsembleTeacher) else parts[0]
    index = data.manifest.rows(split)["index"].tolist()
    return stored_outputs(reference.classes, reference.name, index, outputs, logits=False)


def _member_outputs(
    data: ImageDataModule, member: FrozenTeacher, split: str, device: torch.device, cache: AnswerCache | None
) -> Tensor:
    # Only the first process looks at the disk, and only it needs to have hashed the images: whether processes share
    # their disks makes no difference.
    reducer, known = current_reducer(), None
    place: tuple[list[int], list[str]] = [], []
    if cache is not None:
        if reducer.rank == 0:
            place = _contents(data, split)
            known = cache.find(member, *place, device.type)
        if int(reducer.broadcast_(torch.tensor(int(known is not None), device=device))):
            size = len(data.manifest.rows(split)), len(member.classes)
            return reducer.broadcast_((torch.zeros(size) if known is None else known).to(device)).cpu()
    outputs = _compute(data, member, split, device, reducer)
    if cache is not None and reducer.rank == 0:
        cache.keep(member, *place, outputs, split, device.type)
    return outputs


def _compute(
    data: ImageDataModule, member: FrozenTeacher, split: str, device: torch.device, reducer: Reducer
) -> Tensor:
    home = next((tensor.device for tensor in member.state_dict().values()), device)
    outputs, index = [], []
    # A caller may evaluate in inference mode, which must not spread to the weights; and iterating over a loader draws
    # a number, which training shall not miss.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        loader = data.view_dataloader(split, member.view)
        member.to(device)
        try:
            for batch in track(loader, f"predictions of {member.name}: {split}", total=len(loader)):
                outputs.append(member(batch.input.to(device, non_blocking=True)).float())
                index.append(batch.index)
        finally:
            member.to(home)
        return reducer.gather_rows(torch.cat(outputs), torch.cat(index).to(device))[0].cpu()


def _contents(data: ImageDataModule, split: str) -> tuple[list[int], list[str]]:
    data.manifest.hash_contents()
    rows = data.manifest.rows(split)
    return rows["index"].tolist(), rows["sha"].tolist()


def _check(
    data: ImageDataModule, stored: StoredPredictions, split: str, reducer: Reducer, device: torch.device
) -> None:
    # All processes fail with the same text, though only the first has hashed the images.
    problem = b""
    if reducer.rank == 0:
        try:
            stored.check(*_contents(data, split), split)
        except ValueError as error:
            problem = str(error).encode()
    length = reducer.broadcast_(torch.tensor(len(problem), device=device))
    text = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if problem:
        text.copy_(torch.tensor(list(problem), dtype=torch.uint8))
    if len(text):
        raise ValueError(bytes(reducer.broadcast_(text).tolist()).decode())
