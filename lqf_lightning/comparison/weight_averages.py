"""Networks between an old and a new one, ready to predict."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lqf_lightning.congruence.class_rows import align_classes
from lqf_lightning.congruence.diagonal_fisher import diagonal_fisher
from lqf_lightning.congruence.interpolation import fisher_interpolate, interpolate
from lqf_lightning.congruence.reestimate_batch_norm import reestimate_batch_norm
from lqf_lightning.congruence.soup import soup
from lqf_lightning.data import Batch, ImageDataModule
from lqf_lightning.progress import track
from lqf_lightning.teachers import FrozenTeacher, View

_LEAST_BATCH = 64  # statistics of smaller batches are too noisy to normalize by
_ALL_LABELS = 10  # classes up to which the Fisher information is computed without drawing labels


class WeightAverages:
    """Averages of the weights of an old and of one or several new networks.

    Args:
        old: The old network.
        new: The new networks; of several, the mean of their weights stands for them, with images as the first wants
            them.
        classes: Class names in the order of the averages' outputs. Rows of the head are matched by name; those of
            classes that only the new networks know are theirs.
        data: Gives training images.
        device: Where to compute.
        batch_norm: "reestimate" the running statistics of averages, or "average" them with the weights. Networks with
            equal statistics, as frozen ones have, keep them.
        batch_norm_samples: Training images to estimate them from; None: all.
        fisher_samples: Training images to compute the Fisher information from; None: all.
        seed: Draws these images.
    """

    def __init__(
        self,
        old: FrozenTeacher,
        new: Sequence[FrozenTeacher],
        classes: Sequence[str],
        data: ImageDataModule,
        device: torch.device,
        *,
        batch_norm: str = "reestimate",
        batch_norm_samples: int | None = None,
        fisher_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.classes, self.view, self.head = list(classes), new[0].view, _backbone(new[0]).head
        self._data, self._device, self._seed = data, device, seed
        self._batch_norm_samples, self._fisher_samples = batch_norm_samples, fisher_samples
        self.old_teacher = old
        states = [_state(member) for member in new]
        self.new = soup(align_classes(s, s, self.head, m.classes, classes) for s, m in zip(states, new, strict=True))
        self.old = align_classes(_state(old), self.new, self.head, old.classes, classes)
        self.old = {name: entry.to(self.new[name].dtype) for name, entry in self.old.items()}
        self.single = len(new) == 1
        self.reestimates = batch_norm == "reestimate" and _statistics_differ([_state(old), *states])
        self._backbone = copy.deepcopy(_backbone(new[0]))
        self._fisher: dict[str, Tensor] = {}

    def teacher(self, kind: str, share: float, *, ends: bool = False) -> FrozenTeacher:
        """Build one average.

        Args:
            kind: "fisher", or another name of plain interpolation.
            share: Share of the old network, from 0 to 1.
            ends: Whether to estimate running statistics anew at the ends, too; otherwise the networks are there as they
                were trained.

        Returns:
            The network, on its device; the next one takes its place.
        """
        if kind == "fisher":
            state = fisher_interpolate(self.old, self.new, share, self._old_fisher())
        else:
            state = interpolate(self.old, self.new, share)
        network = self._backbone.model.to(self._device)
        network.load_state_dict(state)
        trained = share == 1 or (share == 0 and self.single)
        if self.reestimates and (ends or not trained):
            reestimate_batch_norm(network, self._training_images(self._batch_norm_samples, f"{kind} {share:g}"))
        return FrozenTeacher(network, self.classes, self.view, f"{kind}, share {share:g}", self._backbone)

    def _old_fisher(self) -> dict[str, Tensor]:
        if not self._fisher:
            network = _backbone(self.old_teacher).model.to(self._device)
            draws = None if len(self.old_teacher.classes) <= _ALL_LABELS else _ALL_LABELS
            images = self._training_images(self._fisher_samples, "Fisher information", self.old_teacher.view)
            raw = diagonal_fisher(network, images, draws=draws, normalize=True, seed=self._seed)
            ones = {name: torch.ones_like(self.new[name], device=raw[name].device) for name in raw}
            self._fisher = align_classes(raw, ones, self.head, self.old_teacher.classes, self.classes)
        return self._fisher

    def _training_images(self, number: int | None, purpose: str, view: View | None = None) -> Iterator[Tensor]:
        # Shuffled, since a sorted set has batches of one class, and in batches of about one size.
        loader = self._data.view_dataloader("train", view or self.view)
        size = len(loader.dataset)  # type: ignore[arg-type]  # an ImageDataset has a length
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self._seed))
        order = order[: size if number is None else number]
        parts = max(len(order) // max(self._data.eval_batch_size, _LEAST_BATCH), 1)
        batches = [part.tolist() for part in torch.tensor_split(order, parts)]
        options: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
        shuffled: DataLoader[Batch] = DataLoader(loader.dataset, batch_sampler=batches, **options)
        for batch in track(shuffled, f"{purpose}: training images"):
            yield batch.input


def _backbone(teacher: FrozenTeacher) -> Any:
    if teacher.backbone is None:
        raise ValueError(
            f"{teacher.name} is no plain network, so that its weights cannot be averaged. Set averages=null"
        )
    return teacher.backbone


def _state(teacher: FrozenTeacher) -> dict[str, Tensor]:
    model: nn.Module = _backbone(teacher).model
    return {name: entry.detach().cpu() for name, entry in model.state_dict().items()}


def _statistics_differ(states: Sequence[dict[str, Tensor]]) -> bool:
    first = states[0]
    names = [name for name in first if name.endswith(("running_mean", "running_var"))]
    return any(not torch.equal(state[name], first[name]) for state in states[1:] for name in names)
