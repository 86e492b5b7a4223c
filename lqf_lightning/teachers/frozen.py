"""A trained network that only answers."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from lqf_lightning.backbones import Backbone
from lqf_lightning.teachers.teacher import Teacher, at_least_single, wide_type
from lqf_lightning.teachers.view import View


class FrozenTeacher(Teacher):
    """A network in use today: it predicts, and nothing else happens to it.

    It stays in eval mode whatever its owner does, takes no gradient, and computes in its own precision, outside
    autocast. What owns it keeps it out of its own modules (in a tuple), so that checkpoints do not hold it.

    Args:
        model: Images in its own view (B, 3, H, H) -> outputs (B, C).
        classes: Class names, in the order of its outputs.
        view: How it wants its images.
        name: What to call it.
        backbone: The plain network whose weights `model` uses as they are, if it is one: its features are then known.
        manifest: File that lists the samples of its run, if it is known: which images it was trained on.

    Attributes:
        fingerprint: Hash of weights, buffers, classes and view: equal answers for equal fingerprints.
        members: The teacher itself, as the only member of an ensemble of one.

    Raises:
        ValueError: Class names repeat.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        view: View,
        name: str,
        backbone: Backbone | None = None,
        *,
        manifest: Path | None = None,
    ) -> None:
        super().__init__()
        if len(set(classes)) < len(classes):
            twice = sorted({c for c in classes if list(classes).count(c) > 1})
            raise ValueError(f"{name} has several classes of the same name, so that it cannot be compared: {twice[:5]}")
        self.model = model.requires_grad_(False)
        self.classes, self.view, self.name, self.backbone = list(classes), view, name, backbone
        self.manifest = manifest
        self.members = (self,)
        self.fingerprint = fingerprint(model, repr((self.classes, view)))
        self.eval()

    @torch.no_grad()
    def forward(
        self, images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Tensor:
        """Answer.

        Args:
            images: Normalized images (B, 3, H, H), of any size.
            mean: Channel means that they were shifted by; None: the teacher's own.
            std: Channel deviations that they were divided by; None: the teacher's own.

        Returns:
            Outputs (B, C) in single precision, or double if the teacher is.
        """
        own = next((p for p in self.model.parameters() if p.is_floating_point()), images)
        seen = self.view.translate(images.to(own.device, own.dtype), mean, std)
        if not len(seen):
            return torch.zeros(0, len(self.classes), device=own.device, dtype=wide_type(own.dtype))
        with torch.autocast(images.device.type, enabled=False):
            outputs: Tensor = at_least_single(self.model(seen))
        return outputs


def fingerprint(model: nn.Module, also: str = "") -> str:
    """Hash what decides a network's answers: its tensors, and its modules with their options as they print.

    Args:
        model: The network.
        also: Further text to hash.

    Returns:
        Hexadecimal digits.
    """
    digest = blake2b(f"{also}{model}".encode(), digest_size=16)
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
