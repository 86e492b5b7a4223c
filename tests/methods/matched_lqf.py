"""References of the tiny network, and the objective that matching one has, written out densely."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lqf_lightning.methods import LQF
from lqf_lightning.teachers import FrozenTeacher, View
from methods.dense_lqf import ALPHA, jacobian, outputs_at_start, penalized
from methods.tensors import CLASSES, draw

SAMPLES = 11
VIEW = View(6, 1.0, (0.5,) * 3, (0.5,) * 3)


def build_teacher(classes: Sequence[str] = CLASSES, learned: int = 6, seed: int = 3) -> FrozenTeacher:
    """A linear classifier that is right on the first samples, as far as it knows their classes, and guesses others."""
    images, label = draw(SAMPLES)
    known = [i for i in range(learned) if CLASSES[label[i]] in classes]
    target = torch.tensor([list(classes).index(CLASSES[label[i]]) for i in known])
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, len(classes))).double()
    inputs = images[known].flatten(1)
    with torch.no_grad():
        wanted = 4 * one_hot(target, len(classes)).double() - model(inputs)
        model[1].weight += (torch.linalg.pinv(inputs) @ wanted).T
        model[1].bias += 0.7
    return FrozenTeacher(model, classes, VIEW, "old")


class DenseMatching:
    """`1/2 sum |f - y|^2 + 1/2 sum F |f - z|^2 + ridge/2 dw^T M dw`, the two squares kept apart."""

    def __init__(
        self,
        method: LQF,
        focus: Tensor,
        reference: Tensor,
        *,
        factors: dict[str, float] | None = None,
        samples: int = SAMPLES,
    ) -> None:
        images, label = draw(samples)
        names = list(method.linearized.deltas)
        owner = {n: g for g, members in method.backbone.groups.items() for n in members}
        sizes = [method.linearized.deltas[n].numel() for n in names]
        ridges = torch.tensor([(factors or {}).get(owner[n], 1.0) for n in names], dtype=torch.float64)
        diagonal = ridges.repeat_interleave(torch.tensor(sizes)) * (penalized(names) if method.intercept_name else 1)
        self.metric, self.ridge = torch.diag(diagonal), samples * method.ridge
        self.rows, self.start = jacobian(images, names), outputs_at_start(images)
        self.target, self.focus, self.reference = ALPHA * one_hot(label, 3).double(), focus, reference

    def gradient(self, dw: Tensor) -> Tensor:
        outputs = self.outputs(dw)
        error = outputs - self.target + self.focus[:, None] * (outputs - self.reference)
        return torch.einsum("bcp,bc->p", self.rows, error) + self.ridge * self.metric @ dw

    def optimum(self) -> Tensor:
        hessian = torch.einsum("b,bcp,bcq->pq", 1 + self.focus, self.rows, self.rows) + self.ridge * self.metric
        return torch.linalg.solve(hessian, -self.gradient(torch.zeros(len(hessian), dtype=torch.float64)))

    def outputs(self, dw: Tensor) -> Tensor:
        return self.start + self.rows @ dw

    def objective(self, dw: Tensor) -> float:
        labels = (self.outputs(dw) - self.target).square().sum()
        matching = (self.focus * (self.outputs(dw) - self.reference).square().sum(1)).sum()
        return float(0.5 * labels + 0.5 * matching + 0.5 * self.ridge * dw @ self.metric @ dw)
