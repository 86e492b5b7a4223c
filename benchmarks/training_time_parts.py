"""The measured parts of `training_time.py`: the kernel, predicted curves, and trainings that they are held against."""

import copy
import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images_from_folder import load_folder
from step_cost import clock
from torch import Tensor, nn

from lqf_lightning.analysis.batch_order import batch_order
from lqf_lightning.backbones import create_backbone
from lqf_lightning.data.sampler import TrainingSampler
from lqf_lightning.linear import Kernel, LinearizedModel, StreamedJacobian, assemble_kernel
from lqf_lightning.linear.output_loss import CrossEntropyOutputLoss, OutputLoss, SquaredOutputLoss
from lqf_lightning.linear.training_curve import TrainingGroup, training_curve
from lqf_lightning.linear.training_rule import TrainingRule
from lqf_lightning.linear.training_time import FRACTIONS, first_passage

ALPHA, CLASSES, CHUNK = 15.0, 10, 25


class Case:
    """Images of a set, the network, and what is collected of it once."""

    def __init__(self, folder: Path, size: Mapping[str, Any], store: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.size, self.store = size, store
        backbone = self.network()
        images, labels = load_folder(folder, size["samples"], size["side"], backbone.mean, backbone.std)
        self.x, self.label = images.to(self.device), labels.to(self.device)
        self.linear = LinearizedModel(backbone.model, example=self.x[:2])

    def network(self) -> Any:
        """The pre-trained network with the same random head every time."""
        torch.manual_seed(0)
        backbone = create_backbone("tf_efficientnet_lite0", CLASSES, weights="package", image_size=self.size["side"])
        backbone.model.to(self.device)
        return backbone

    def collected(self) -> dict[str, Any]:
        """Outputs before training, the kernel, what the weights themselves do, and the seconds; kept on disk."""
        if not self.store.exists():
            start = clock(self.device)
            chunks = self.x.split(CHUNK)
            jacobian = StreamedJacobian(self.linear, chunks)
            initial = jacobian.initial().double()
            weights = {n: p.detach() for n, p in self.linear.model.named_parameters() if n in self.linear.deltas}
            origin = jacobian.push(weights)[0].double()
            matrix = assemble_kernel(self.linear, {"all": list(weights)}, chunks).train.groups["all"].double()
            seconds = clock(self.device) - start
            top = float(torch.linalg.eigvalsh(matrix[0])[-1])
            torch.save(
                {"initial": initial, "origin": origin, "matrix": matrix, "top": top, "seconds": seconds}, self.store
            )
        found: dict[str, Any] = torch.load(self.store, weights_only=True, map_location=self.device)
        return found


def draw_setting(number: int, samples: int, steps: int, linear: bool, *, whole: bool | None = None) -> dict[str, Any]:
    """Hyper-parameters by lot: the learning rate in units of the longest stable one."""
    draw = torch.Generator().manual_seed(1000 * linear + number)

    def pick(values: list[Any]) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    low, high = (0.05, 0.6) if linear else (0.08, 0.6)
    share = low * (high / low) ** float(torch.rand(1, generator=draw))
    batch = pick([samples, samples // 4, samples // 8])
    if whole is not None:
        batch = samples if whole else samples // 4
    return {
        "number": number, "share": share, "batch": max(1, batch), "momentum": pick([0.0, 0.5, 0.9]),
        "decay": pick([0.0, 1e-4, 1e-3, 1e-2]), "schedule": pick(["constant", "cosine", "multistep"]), "steps": steps,
    }  # fmt: skip


def make_rule(setting: Mapping[str, Any], curvature: float) -> TrainingRule:
    """The steps of a setting, whose longest rate is that of momentum 0 over the final effect of momentum."""
    momentum, steps = setting["momentum"], setting["steps"]
    peak = setting["share"] * 2 / curvature * (1 - momentum)
    t = torch.arange(steps, dtype=torch.float64) / steps
    factors = {
        "constant": torch.ones_like(t),
        "cosine": 0.5 * (1 + torch.cos(math.pi * t)),
        "multistep": 0.1 ** ((t >= 0.5).double() + (t >= 0.8).double()),
    }[setting["schedule"]]
    return TrainingRule(peak * factors, momentum)


def compare(case: Case, setting: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """One training, predicted and measured."""
    known, linear = case.collected(), kind == "lqf"
    # At equal probabilities the Hessian of the cross-entropy is 1 / C at most.
    curvature = known["top"] / len(case.x) / (1 if linear else CLASSES)
    rule = make_rule(setting, curvature)
    sampler = TrainingSampler(len(case.x), setting["number"], batch_size=setting["batch"])
    batches = [rows.to(case.device) for rows in islice(batch_order(sampler), rule.steps)]
    start = clock(case.device)
    target = ALPHA * F.one_hot(case.label, CLASSES).double()
    loss: OutputLoss = SquaredOutputLoss(target) if linear else CrossEntropyOutputLoss(case.label)
    group = TrainingGroup(1.0, setting["decay"], None if linear else known["origin"])
    curve = training_curve(
        Kernel({"all": known["matrix"]}, CLASSES), known["initial"], loss, rule, groups={"all": group}, batches=batches
    )
    predicted_seconds = clock(case.device) - start
    start = clock(case.device)
    measured = train(case, rule, setting["decay"], batches, kind)
    window, initial = -(-len(case.x) // setting["batch"]), float(curve.loss[0])
    rows = [
        {
            "fraction": fraction,
            "predicted": first_passage(curve.batch_loss.cpu(), fraction * initial, window),
            "measured": first_passage(measured, fraction * initial, window),
        }
        for fraction in FRACTIONS
    ]
    return {
        "setting": dict(setting), "kind": kind, "rows": rows, "initial": initial,
        "seconds": {"predicted": predicted_seconds, "trained": clock(case.device) - start},
        "largest_loss_error": float((curve.batch_loss.cpu() - measured).abs().max() / initial),
    }  # fmt: skip


def train(case: Case, rule: TrainingRule, decay: float, batches: list[Tensor], kind: str) -> Tensor:
    """The loss of every batch in a real training: fine-tuning, with or without batch statistics, or LQF."""
    if kind == "lqf":
        model: nn.Module = copy.deepcopy(case.linear)
        parameters = list(model.deltas.values())  # type: ignore[operator,union-attr]  # a LinearizedModel
    else:
        model = case.network().model.requires_grad_(True).eval()
        if kind == "batch_norm":
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout) or type(module).__name__.startswith("Drop"):
                    module.eval()
        parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=rule.momentum, weight_decay=decay)
    target, seen = ALPHA * F.one_hot(case.label, CLASSES).float(), []
    for rate, rows in zip(rule.rates.tolist(), batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        total = 0.0
        # Batches are cut into pieces that fit into the cache; batch statistics need them whole.
        pieces = [rows] if kind == "batch_norm" else rows.split(CHUNK)
        for piece in pieces:
            outputs = model(case.x[piece])
            if kind == "lqf":
                loss = 0.5 * (outputs - target[piece]).square().sum() / len(rows)
            else:
                loss = F.cross_entropy(outputs, case.label[piece], reduction="sum") / len(rows)
            loss.backward()
            total += float(loss.detach().double())
        optimizer.step()
        seen.append(total)
    return torch.tensor(seen, dtype=torch.float64)
