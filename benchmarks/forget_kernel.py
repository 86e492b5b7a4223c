"""The part of `forget.py` that has the kernel: requests, retrainings with other heads, attacks, a bad scrub."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from forget_parts import (
    Case,
    Tensors,
    automatic_mu,
    certify,
    distance,
    kept_kernel,
    kept_solution,
    read_outs,
    requests,
    solve_with_kernel,
    without,
)
from torch import Tensor

from lqf_lightning.forgetting.activation_distance import activation_distance
from lqf_lightning.forgetting.best_attack import best_attack_auc
from lqf_lightning.forgetting.likelihood_ratio_attack import likelihood_ratio_attack
from lqf_lightning.forgetting.release_test import release_test
from lqf_lightning.forgetting.shadow_fit import logit_confidence
from lqf_lightning.forgetting.tug_of_war import tug_of_war
from lqf_lightning.linear import (
    DualFactor,
    Kernel,
    StreamedJacobian,
    restrict_kernel,
)

SIGMA, RELEASES, QUERIES = 1e-3, 20, 64


class Kernelled:
    """One head, its kernel, and everything that is solved with it. The samples behind `trained` belong to nobody."""

    def __init__(self, data: Path, size: dict[str, Any], work: Path, seed: int) -> None:
        self.case, self.work, self.seed = Case(data, size, seed), work, seed
        self.trained = size["trained"]
        self.kernel, self.assembly = kept_kernel(self.case, work / f"kernel_{seed}.safetensors")
        self.mu = self._settled_mu(work / "mu.json")
        self.gone = requests(self.trained, 0.01, size["requests"])

    def _settled_mu(self, file: Path) -> float:
        if not file.exists():
            file.write_text(json.dumps(automatic_mu(self.case, self.kernel, torch.arange(self.trained))))
        return float(json.loads(file.read_text()))

    def after(self, number: int) -> dict[str, Any]:
        """The optimum after some requests, from the kernel."""
        kept = without(self.trained, self.gone[:number])
        stem = self.work / f"head_{self.seed}_after_{number}"
        return kept_solution(stem, lambda: solve_with_kernel(self.case, self.kernel, kept, self.mu))

    def anew(self, number: int) -> dict[str, Any]:
        """The same with a kernel of the retained samples only, assembled for the purpose."""

        def solve() -> dict[str, Any]:
            kept, start = without(self.trained, self.gone[:number]), time.process_time()
            kernel = self.case.kernel(kept)
            spent = time.process_time() - start
            found = solve_with_kernel(self.case, kernel, kept, self.mu, own=True)
            return {**found, "seconds": spent + found["seconds"], "assembly": spent}

        return kept_solution(self.work / f"head_{self.seed}_anew_{number}", solve)

    def answers(self, name: str, weights: Tensors) -> tuple[Tensor, Tensor]:
        """Outputs on the training and on the test samples."""
        file = self.work / f"head_{self.seed}_answers_{name}.pt"
        if not file.exists():
            torch.save(self.case.outputs(weights), file)
        train, test = torch.load(file, weights_only=True)
        return train, test


def scrub_by_kernel(data: Path, size: dict[str, Any], work: Path) -> dict[str, Any]:
    """All requests, with read-outs, for every head."""
    file = work / "found.json"
    if not file.exists():
        heads = [read_head(Kernelled(data, size, work, seed), size) for seed in range(size["seeds"])]
        file.write_text(json.dumps({"heads": heads, **first_head(Kernelled(data, size, work, 0), size)}))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def read_head(head: Kernelled, size: dict[str, Any]) -> dict[str, Any]:
    """Read-outs before any request and after every one, on the cohort of the request and on all so far."""
    base, rows = head.after(0), []
    answers = {0: head.answers("after_0", base["movement"])}
    last = head.after(size["requests"])
    for k in range(1, size["requests"] + 1) if head.seed == 0 else [size["requests"]]:
        found = head.after(k)
        answers[k] = head.answers(f"after_{k}", found["movement"])
        so_far = torch.cat(list(head.gone[:k]))
        row = {"request": k, **{name: found[name] for name in ("seconds", "passes", "distance_bound")}}
        row["moved"] = distance(found["movement"], head.after(k - 1)["movement"]) if head.seed == 0 else None
        row["moved_from_original"] = distance(found["movement"], base["movement"])
        row["original"] = reading(head, answers[0], so_far)
        row["forgotten"] = reading(head, answers[k], so_far)
        row["activation_distance_to_original"] = activation_distance(answers[0][0][so_far], answers[k][0][so_far])
        rows.append(row)
    return {"seed": head.seed, "mu": head.mu, "assembly": head.assembly, "requests": rows, "last": last["seconds"]}


def reading(head: Kernelled, answers: tuple[Tensor, Tensor], cohort: Tensor) -> dict[str, Any]:
    """Errors, and the entropy attack on the cohort."""
    return read_outs(head.case, answers, cohort, without(head.trained, [cohort]))


def first_head(head: Kernelled, size: dict[str, Any]) -> dict[str, Any]:
    """Against an independent retraining after the last request; attacks with shadow models; a bad scrub."""
    last, cohort = size["requests"], torch.cat(list(head.gone))
    original, scrubbed, retrained = head.after(0), head.after(last), head.anew(last)
    apart = distance(scrubbed["movement"], retrained["movement"])
    wrong = wrongly_normalized(head, cohort, original["movement"])
    models = {"original": original, "scrubbed": scrubbed, "retrained": retrained, "wrong": wrong}
    answers = {name: head.answers(name, found["movement"]) for name, found in models.items()}
    shadows = shadow_models(head, cohort, size["shadows"])
    kept, target = without(head.trained, [cohort]), answers["retrained"]
    reference = reading(head, target, cohort)
    result = {}
    at_zero = certify(head.case, kept, head.mu, head.case.zeros())["distance_bound"]
    for name, found in models.items():
        bound = certify(head.case, kept, head.mu, found["movement"])["distance_bound"]
        own = reading(head, answers[name], cohort)
        keys = ("retain_error", "forget_error", "test_error")
        result[name] = own | {
            "distance": distance(found["movement"], retrained["movement"]),
            "distance_bound": bound,
            "relative_gradient": bound / at_zero,
            "tug_of_war": tug_of_war({k: 1 - own[k] for k in keys}, {k: 1 - reference[k] for k in keys}),
            "activation_distance": activation_distance(answers[name][0][cohort], target[0][cohort]),
            "likelihood_ratio": attacked(head, answers[name], cohort, shadows),
            "best_attack_auc": best_attack_auc(distance(found["movement"], retrained["movement"]), SIGMA),
            "release_p": released_apart(head, found["movement"], retrained["movement"]),
        }
    return {
        "sigma": SIGMA, "models": result, "scrubbed_to_retrained": apart, "retrain_seconds": retrained["seconds"],
        "retrain_assembly": retrained["assembly"], "cohort": len(cohort),
        "noisy_test_error": noisy_error(head, scrubbed["movement"]),
    }  # fmt: skip


def wrongly_normalized(head: Kernelled, cohort: Tensor, start: Tensors) -> dict[str, Any]:
    """The Newton step with the Hessian of the sum and the gradient of the mean: it falls short by the number n."""
    kept = without(head.trained, [cohort])
    right = head.after(len(head.gone))["movement"]
    return {"movement": {name: start[name] + (right[name] - start[name]) / len(kept) for name in start}}


def shadow_models(head: Kernelled, cohort: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Confidences on the cohort and on samples of nobody, of models trained on random halves, by their kernel."""
    draw = torch.Generator().manual_seed(1)
    watched = torch.cat([cohort, torch.arange(head.trained, head.case.samples)])
    confidence, member = [], []
    for _ in range(number):
        half = torch.randperm(head.trained, generator=draw)[: head.trained // 2].sort().values
        problem = head.case.problem(half, head.mu)
        factor = DualFactor(problem, restrict_kernel(head.kernel, rows=half, columns=half))
        cross: Kernel = restrict_kernel(head.kernel, rows=watched, columns=half)
        outputs = factor.predict(cross, head.case.initial[watched].double())
        confidence.append(logit_confidence(outputs, head.case.y[watched]))
        member.append(torch.isin(cohort, half))
    rows = torch.stack(confidence)
    return rows[:, : len(cohort)], torch.stack(member), rows[:, len(cohort) :]


def attacked(
    head: Kernelled, answers: tuple[Tensor, Tensor], cohort: Tensor, shadows: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """The likelihood-ratio attack on one model."""
    own, member, other = shadows
    train, others = answers[0], torch.arange(head.trained, head.case.samples)
    found = likelihood_ratio_attack(
        logit_confidence(train[cohort], head.case.y[cohort]), own, member,
        logit_confidence(train[others], head.case.y[others]), other,
    )  # fmt: skip
    return {"auc": found.auc, "error": found.error, "in_out_auc": found.in_out_auc, "in_out_error": found.in_out_error}


def released_apart(head: Kernelled, first: Tensors, second: Tensors) -> float:
    """Whether noisy releases of two models answer some training and test images differently: the p-value."""
    draw = torch.Generator().manual_seed(2)
    queries = torch.cat([head.case.x[torch.cat(list(head.gone))], head.case.x_test])[:QUERIES]
    jacobian = StreamedJacobian(head.case.model, [queries])
    groups = []
    for weights in (first, second):
        noisy = [noised(weights, draw) for _ in range(RELEASES)]
        groups.append(torch.stack([rows.flatten().double() for rows in jacobian.push(*noisy)]))
    return release_test(*groups).p_value


def noisy_error(head: Kernelled, weights: Tensors) -> float:
    """Test error of releases, averaged."""
    draw = torch.Generator().manual_seed(3)
    jacobian = StreamedJacobian(head.case.model, head.case.x_test.split(64))
    outputs = jacobian.push(*(noised(weights, draw) for _ in range(4)))
    wrong = [((head.case.test_initial + rows).argmax(1) != head.case.y_test).double().mean() for rows in outputs]
    return float(torch.stack(wrong).mean())


def noised(weights: Tensors, draw: torch.Generator) -> Tensors:
    """One release."""
    return {name: w + SIGMA * torch.randn(w.shape, generator=draw) for name, w in weights.items()}
