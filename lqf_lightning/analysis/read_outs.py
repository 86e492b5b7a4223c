"""Everything that judges a scrubbed model by its answers, beside the original and the retrained one."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.analysis.answers_of_model import Answers
from lqf_lightning.analysis.shadow_models import ShadowModels
from lqf_lightning.forgetting.activation_distance import Norm, activation_distance
from lqf_lightning.forgetting.anamnesis_index import anamnesis_index
from lqf_lightning.forgetting.entropy_attack import entropy_attack
from lqf_lightning.forgetting.likelihood_ratio_attack import LikelihoodRatioAttack, likelihood_ratio_attack
from lqf_lightning.forgetting.shadow_fit import logit_confidence
from lqf_lightning.forgetting.tug_of_war import tug_of_war

PARTS = ("retain", "forget", "test")


def read_outs(
    answers: Mapping[str, Answers],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    against: str = "retrained",
    relearn_steps: Mapping[str, int | None] | None = None,
    relearn: Mapping[str, Any] | None = None,
    shadows: ShadowModels | str = "no shadow models were made",
    norm: Norm = "l1",
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Read out models that were asked the same questions.

    Args:
        answers: Answers by name of the model: "original", "scrubbed", "retrained".
        loss: Of outputs (n, C) and labels (n,), averaged over samples, as `method.loss`.
        against: Name of the model that the others are measured by; where it is not among the answers, activation
            distance, tug of war and anamnesis index are None.
        relearn_steps: Steps by name of the model, as of `Relearning.steps`; None: nothing was relearned.
        relearn: What they depend on, as of `Relearning.describe`.
        shadows: Shadow models for the likelihood-ratio attack, or the reason why there are none.
        norm: Of the activation distance.
        temperature: T of every softmax, see `activation_distance`.
        seed: Of the bootstrap for the error of the entropy attack.

    Returns:
        Plain values, ready for JSON: "models" by name, "against", "relearn", "norm", "temperature" and
        "likelihood_ratio", which says what the attack used or why there was none. What does not exist is None.

    Refused are models that were asked about different samples, and numbers that are not finite.
    """
    _refuse_other_questions(answers)
    reference = answers.get(against)
    models: dict[str, dict[str, Any]] = {}
    for name, found in answers.items():
        models[name] = {
            **_errors(found, loss),
            **_entropy(found, temperature, seed),
            **_likelihood_ratio(found, shadows),
            "activation_distance": None if reference is None else _distances(found, reference, norm, temperature),
            "tug_of_war": None if reference is None else tug_of_war(_accuracies(found), _accuracies(reference)),
            **_relearned(name, relearn_steps or {}, against),
        }
    result = {
        "models": models,
        "against": None if reference is None else against,
        "relearn": None if relearn is None else dict(relearn),
        "norm": f"{norm.upper()} of softmax outputs",
        "temperature": float(temperature),
        "likelihood_ratio": _used(shadows),
    }
    _refuse_odd_numbers(result, "read_outs")
    return result


def _errors(found: Answers, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    errors = {f"{part}_error": 1.0 - accuracy for part, accuracy in _accuracies(found).items()}
    losses = {f"{part}_loss": float(loss(getattr(found, part).logits, getattr(found, part).label)) for part in PARTS}
    return errors | losses


def _accuracies(found: Answers) -> dict[str, float]:
    return {part: getattr(found, part).accuracy for part in PARTS}


def _entropy(found: Answers, temperature: float, seed: int) -> dict[str, Any]:
    logits = (found.retain.logits, found.test.logits, found.forget.logits)
    attack = entropy_attack(*logits, temperature=temperature, seed=seed)
    return {
        "entropy_attack": attack.share,
        "entropy_attack_error": attack.error,
        "entropy_attack_accuracy": attack.balanced_accuracy,
    }


def _likelihood_ratio(found: Answers, shadows: ShadowModels | str) -> dict[str, float | None]:
    names = ("auc", "error", "in_out_auc", "in_out_error")
    attack = None if isinstance(shadows, str) else attack_answers(found, shadows)
    return {f"likelihood_ratio_{name}": None if attack is None else getattr(attack, name) for name in names}


def attack_answers(found: Answers, shadows: ShadowModels) -> LikelihoodRatioAttack:
    """Attack a model with shadow models of its run.

    Args:
        found: The model's answers, those on the validation split included.
        shadows: The shadow models.

    Returns:
        What the attack says about the cohort.

    Raises:
        ValueError: Model and shadow models know different samples.
    """
    others = found.validation
    if others is None or not torch.equal(others.index, shadows.other_index):
        raise ValueError("shadow models know validation samples: collect answers with validation=True on the same ones")
    if not torch.equal(found.forget.index, shadows.index):
        raise ValueError("the shadow models were made for another cohort. Make them for the rows of this one")
    observed = [logit_confidence(part.logits, part.label) for part in (found.forget, others)]
    shadow = [
        logit_confidence(shadows.cohort, found.forget.label),
        logit_confidence(shadows.others, others.label),
    ]
    return likelihood_ratio_attack(observed[0], shadow[0], shadows.member, observed[1], shadow[1])


def _distances(found: Answers, reference: Answers, norm: Norm, temperature: float) -> dict[str, float]:
    return {
        part: activation_distance(
            getattr(found, part).logits, getattr(reference, part).logits, norm=norm, temperature=temperature
        )
        for part in PARTS
    }


def _relearned(name: str, steps: Mapping[str, int | None], against: str) -> dict[str, Any]:
    return {
        "relearn_steps": steps.get(name),
        "anamnesis_index": anamnesis_index(steps.get(name), steps.get(against)),
    }


def _used(shadows: ShadowModels | str) -> dict[str, Any]:
    if isinstance(shadows, str):
        return {"shadows": 0, "exact": None, "why": shadows}
    return {"shadows": len(shadows.member), "exact": shadows.exact, "why": None}


def _refuse_other_questions(answers: Mapping[str, Answers]) -> None:
    if not answers:
        raise ValueError("there is no model to read out")
    first = next(iter(answers))
    for name, found in answers.items():
        for part in PARTS:
            if not torch.equal(getattr(found, part).index, getattr(answers[first], part).index):
                raise ValueError(
                    f"{name!r} and {first!r} were asked about different {part} samples. Ask all by one `Questions`"
                )


def _refuse_odd_numbers(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _refuse_odd_numbers(entry, f"{name}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: this model has diverged. Set a smaller step for the scrub that made it")
