"""Several networks that answer as one."""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn

from lqf_lightning.teachers.frozen import FrozenTeacher
from lqf_lightning.teachers.teacher import Teacher


class EnsembleTeacher(Teacher):
    r"""The mean of the outputs (not of the probabilities) of its members (Yan et al., CVPR 2021, eq. 10).

    .. math:: z(x) = \frac1L \sum_l z_l(x)

    Outputs are aligned by class name, and members are sorted by fingerprint: their order does not matter.

    Args:
        members: Teachers of the same classes, in any order.

    Attributes:
        classes: Class names of the first member, in its order.
        view: That of the first member, for whom images are prepared; the others translate.
        name: Those of the members.
        fingerprint: Hash of those of the members.
        backbone: That of a single member.

    Raises:
        ValueError: There is no member, or their classes differ.
    """

    def __init__(self, members: Sequence[FrozenTeacher]) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one member, got none. Set reference=[a.ckpt, b.ckpt]")
        self.classes, self.view = list(members[0].classes), members[0].view
        for member in members:
            if set(member.classes) != set(self.classes):
                odd = sorted(set(member.classes) ^ set(self.classes))
                raise ValueError(
                    f"members of an ensemble need the same classes; {members[0].name} and {member.name} differ in "
                    f"{odd[:5]}. Set reference to models of one set of classes"
                )
        self.members = tuple(sorted(members, key=lambda member: member.fingerprint))
        self.models = nn.ModuleList(self.members)
        self.name = " + ".join(member.name for member in members)
        self.fingerprint = blake2b("".join(m.fingerprint for m in self.members).encode(), digest_size=16).hexdigest()
        self.backbone = members[0].backbone if len(members) == 1 else None

    @torch.no_grad()
    def forward(
        self, images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Tensor:
        """Answer.

        Args:
            images: Normalized images (B, 3, H, H), of any size.
            mean: Channel means that they were shifted by; None: the ensemble's own.
            std: Channel deviations that they were divided by; None: the ensemble's own.

        Returns:
            Mean outputs (B, C).
        """
        mean, std = self.view.mean if mean is None else mean, self.view.std if std is None else std
        answers = [in_order_of(self.classes, member.classes, member(images, mean, std)) for member in self.members]
        return torch.stack(answers).mean(0)


def in_order_of(wanted: Sequence[str], classes: Sequence[str], outputs: Tensor) -> Tensor:
    """Sort outputs by class name.

    Args:
        wanted: Class names, in the order that is wanted.
        classes: The same names, in the order of the outputs.
        outputs: Outputs (B, C).

    Returns:
        Outputs (B, C) in the order of `wanted`.
    """
    if list(wanted) == list(classes):
        return outputs
    place = {name: position for position, name in enumerate(classes)}
    return outputs[:, [place[name] for name in wanted]]
