"""The linear problems that `forget.py` scrubs, and the ways to solve them, with the work that each takes."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images_from_folder import load_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from lqf_lightning.backbones import create_backbone
from lqf_lightning.forgetting import entropy_attack
from lqf_lightning.linear import (
    ConjugateGradient,
    DualPrecondition,
    Kernel,
    KernelSpectrum,
    LinearizedModel,
    QuadraticProblem,
    StreamedJacobian,
    assemble_kernel,
    regularization_path,
    restrict_kernel,
    ridge_of_mean,
)
from lqf_lightning.linear.least_gradient import LeastGradient

ALPHA, CHUNK, UNITS = 15.0, 64, 5  # units of work of one training step, which is one pass
Tensors = dict[str, Tensor]


class Case:
    """One set of images, EfficientNet-Lite0 with a fresh head, and its linear problem without an intercept."""

    def __init__(self, folder: Path, size: dict[str, Any], seed: int = 0) -> None:
        torch.manual_seed(seed)
        classes = len(list((folder / "train").iterdir()))
        backbone = create_backbone("tf_efficientnet_lite0", classes, weights="package", image_size=size["side"])
        mean, std = backbone.mean, backbone.std
        self.x, self.y = load_folder(folder / "train", size["train"], size["side"], mean, std)
        self.x_test, self.y_test = load_folder(folder / "test", size["test"], size["side"], mean, std)
        self.model = LinearizedModel(backbone.model, example=self.x[:2])
        self.samples, self.classes = len(self.x), classes
        self.initial = StreamedJacobian(self.model, self.x.split(CHUNK)).initial()
        self.test_initial = StreamedJacobian(self.model, self.x_test.split(CHUNK)).initial()

    def jacobian(self, kept: Tensor) -> StreamedJacobian:
        """The Jacobian of some training samples."""
        return StreamedJacobian(self.model, [self.x[part] for part in kept.split(CHUNK)])

    def problem(self, kept: Tensor, mu: float) -> QuadraticProblem:
        """The problem of some training samples, in sum form."""
        target = ALPHA * F.one_hot(self.y[kept], self.classes).double()
        return QuadraticProblem(self.initial[kept], target, ridge_of_mean(mu, len(kept)))

    def zeros(self) -> Tensors:
        """The weights before training."""
        return {name: torch.zeros_like(delta) for name, delta in self.model.deltas.items()}

    def kernel(self, kept: Tensor) -> Kernel:
        """Assembled anew, 64 images at a time."""
        parts = [self.x[part] for part in kept.split(CHUNK)]
        return assemble_kernel(self.model, {"all": list(self.model.names)}, parts, budget=2**32).train

    def outputs(self, movement: Tensors) -> tuple[Tensor, Tensor]:
        """On all training samples, and on the test samples."""
        everything = torch.arange(self.samples)
        train = self.initial + self.jacobian(everything).push(movement)[0]
        test = self.test_initial + StreamedJacobian(self.model, self.x_test.split(CHUNK)).push(movement)[0]
        return train.double(), test.double()


def kept_kernel(case: Case, file: Path) -> tuple[Kernel, float]:
    """The kernel of all training samples and the seconds that it took, kept in a file."""
    if not file.exists():
        start = time.process_time()
        kernel = case.kernel(torch.arange(case.samples))
        spent = torch.tensor(time.process_time() - start, dtype=torch.float64)
        save_file({"all": kernel.groups["all"].contiguous(), "seconds": spent}, file)
    stored = load_file(file)
    if stored["all"].shape[-1] != case.samples * case.classes:
        raise SystemExit(f"{file} is the kernel of other images; remove it")
    return Kernel({"all": stored["all"]}, case.classes), float(stored["seconds"])


def automatic_mu(case: Case, kernel: Kernel, kept: Tensor) -> float:
    """The ridge of the mean form with the best leave-one-out accuracy on some samples."""
    spectrum = KernelSpectrum(case.problem(kept, 1.0), restrict_kernel(kernel, rows=kept, columns=kept))
    return float(regularization_path(spectrum).choose(by="accuracy")) / len(kept)


def solve_with_kernel(case: Case, kernel: Kernel, kept: Tensor, mu: float, own: bool = False) -> dict[str, Any]:
    """The optimum on the kept samples from the kernel of all, or of them: factor, solve, pull, and refine once.

    The kernel is rounded to single precision; the outputs of the weights tell what is left, and the factor removes it.
    """
    start = time.process_time()
    problem = case.problem(kept, mu)
    inverse = DualPrecondition(problem, kernel if own else restrict_kernel(kernel, rows=kept, columns=kept))
    coefficients = inverse(problem.residual)
    jacobian = case.jacobian(kept)
    movement = jacobian.pull(coefficients)[0]
    misfit = problem.residual - jacobian.push(movement)[0] - problem.ridge * coefficients
    correction = jacobian.pull(inverse(misfit))[0]
    movement = {name: entry + correction[name] for name, entry in movement.items()}
    bound = certify(case, kept, mu, movement)
    return {"movement": movement, "seconds": time.process_time() - start, "passes": 15 / UNITS, **bound}


def certify(case: Case, kept: Tensor, mu: float, movement: Tensors) -> dict[str, float]:
    """The true gradient at some weights, from scratch: one push and one pull."""
    problem, jacobian = case.problem(kept, mu), case.jacobian(kept)
    descent = ConjugateGradient(problem, movement, image=jacobian.push(movement)[0])
    descent.receive_gradient(jacobian.pull(descent.residual)[0])
    return {"distance_bound": descent.certificate.distance_bound}


def solve_by_descent(
    case: Case, kept: Tensor, mu: float, start: Tensors | None, distance: float, most: int
) -> dict[str, Any]:
    """Conjugate gradients to a bound on the distance from the optimum, from given weights or from zero.

    The bound is that of the combination of points with the least gradient.
    """
    began, units = time.process_time(), 0
    problem, jacobian = case.problem(kept, mu), case.jacobian(kept)
    image = None
    if start is not None:
        image, units = jacobian.push(start)[0], 3
    descent = ConjugateGradient(problem, case.zeros() if start is None else start, image=image)
    descent.receive_gradient(jacobian.pull(descent.residual)[0])
    units += 3
    least, curve = LeastGradient(descent), [(units / UNITS, descent.certificate.distance_bound)]
    while curve[-1][1] > distance and descent.steps < most:
        descent.receive_image(jacobian.push(descent.direction)[0])
        descent.receive_gradient(jacobian.pull(descent.residual)[0])
        least.update()
        units += 6
        curve.append((units / UNITS, least.certificate.distance_bound))
        print(f"step {descent.steps}: |dw - dw*| <= {curve[-1][1]:.4g}", flush=True)
    return {
        "movement": least.movement, "seconds": time.process_time() - began, "passes": units / UNITS,
        "steps": descent.steps, "distance_bound": curve[-1][1], "curve": curve,
    }  # fmt: skip


def distance(first: Tensors, second: Tensors) -> float:
    """Between two sets of weights."""
    return sum(float((first[name].double() - second[name].double()).square().sum()) for name in first) ** 0.5


def read_outs(case: Case, answers: tuple[Tensor, Tensor], cohort: Tensor, kept: Tensor) -> dict[str, Any]:
    """Errors, and the entropy attack on the cohort."""
    train, test = answers
    parts = {"retain": (train[kept], case.y[kept]), "forget": (train[cohort], case.y[cohort])}
    parts["test"] = (test, case.y_test)
    attack = entropy_attack(train[kept], test, train[cohort])
    errors = {f"{name}_error": float((z.argmax(1) != y).double().mean()) for name, (z, y) in parts.items()}
    return {**errors, "entropy_attack": attack.share, "entropy_attack_error": attack.error}


def requests(samples: int, share: float, number: int) -> Sequence[Tensor]:
    """Disjoint random cohorts, in order."""
    size = max(1, round(share * samples))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    return [order[k * size : (k + 1) * size].sort().values for k in range(number)]


def without(samples: int, gone: Sequence[Tensor]) -> Tensor:
    """Positions of all other samples."""
    mask = torch.ones(samples, dtype=torch.bool)
    for cohort in gone:
        mask[cohort] = False
    return mask.nonzero().flatten()


def kept_solution(stem: Path, solve: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Weights and figures, from files if they have been computed before."""
    figures, tensors = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    if not figures.exists():
        found = solve()
        movement: Tensors = found.pop("movement")
        save_file({name: entry.contiguous() for name, entry in movement.items()}, tensors)
        figures.write_text(json.dumps(found))
    return {**json.loads(figures.read_text()), "movement": load_file(tensors)}
