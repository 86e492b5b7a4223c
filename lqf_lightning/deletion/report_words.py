"""The numbers of a deletion report in words that a privacy officer reads."""

import math
from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]

QUANTITIES = {
    "retain_error": ("error on retained samples", "Share of wrong answers on the training samples that stay."),
    "forget_error": ("error on forgotten samples", "The same on the samples of the request."),
    "test_error": ("error on test samples", "The same on samples that no model has seen."),
    "forget_loss": ("loss on forgotten samples", "Low where a model remembers labels."),
    "test_loss": ("loss on test samples", "What the loss is where nothing can be remembered."),
    "entropy_attack": (
        "called members by entropy",
        "Share of the forgotten samples that an attacker takes for training samples because the model is sure of them. "
        "The aim is the retrained model's share, not 0 %.",
    ),
    "likelihood_ratio_auc": (
        "likelihood ratio attack",
        "How often an attacker with shadow models ranks a forgotten sample above one never seen: 0.5 is guessing. The "
        "aim is the retrained model's value.",
    ),
    "relearn_steps": ("steps to relearn", "Training steps until the forgotten samples are known again."),
    "anamnesis_index": (
        "anamnesis index",
        "Steps to relearn over those of the retrained model: 1 is the aim, below 1 something is left.",
    ),
    "tug_of_war": ("tug of war", "Agreement of all three accuracies with the retrained model's: 1 is the aim."),
    "activation_distance": (
        "distance of answers",
        "Mean distance of the probabilities from the retrained model's: 0 is the aim.",
    ),
}
# Attack scores that have a standard error, and its name in the report.
ATTACKS = {"entropy_attack": "entropy_attack_error", "likelihood_ratio_auc": "likelihood_ratio_error"}
_SHARES = ("retain_error", "forget_error", "test_error", "entropy_attack")
SCRUBS = {
    "zero": "The trained weights are set to zero; what is left is the core, which never saw the samples.",
    "newton": "A Newton step to the optimum on the retained samples, by conjugate gradients with a certificate.",
    "kernel": "The kernel matrix without the rows of the samples, solved exactly.",
    "fisher": "Noise on every weight, the less of it, the more the retained samples depend on the weight.",
    "ntk": "The change that a linear model around the initial weights would make.",
    "finetune": "Further training on the retained samples.",
    "gradient_ascent": "Steps that raise the loss of the samples.",
    "random_labels": "Training with random labels for the samples.",
    "hide_class": "The outputs of the class are hidden; the weights below them stay.",
}


def advantage(nats: float) -> float:
    r"""How much better than guessing any test can tell the released model from one that never saw the samples.

    The advantage, true positives less false positives, is at most the total variation, which is at most
    :math:`\sqrt{K / 2}` (Pinsker) and at most :math:`\sqrt{1 - e^{-K}}` (Bretagnolle and Huber), the smaller one for
    large K. It assumes nothing about the test but that it sees this one release.

    Args:
        nats: Bound K of the divergence between the two, in nats; infinity allowed.

    Returns:
        Bound between 0 and 1; a test is right in at most :math:`(1 + a) / 2` of even cases.

    Raises:
        ValueError: The bound is negative or not a number.

    Example:
        >>> round(advantage(0.02), 9), advantage(float("inf"))
        (0.1, 1.0)
    """
    if not nats >= 0:
        raise ValueError(f"a divergence is never negative, got {nats} nats")
    return min(math.sqrt(nats / 2), math.sqrt(-math.expm1(-nats)))


def bound_in_words(nats: float | None, noise: Report | None) -> str:
    """What the bound says about somebody who tests the model.

    Args:
        nats: The bound; None if there is none.
        noise: The noise of the report; None if none was added.

    Returns:
        Some sentences.

    Example:
        >>> print(bound_in_words(0.02, {"kind": "isotropic", "sigma": 0.001})[:61])
        At most 0.02 nats (0.0289 bits) of information about the samp
    """
    if noise is None and nats == 0:
        return "None: the released weights are the same whatever the samples were."
    if noise is None:
        return (
            "No noise was added, so nothing hides a difference, however small, and the bound is infinite: who knew the "
            "exact optimum without the samples could tell the two apart by rounding alone. Set sigma=1e-3 for a bound."
        )
    if nats is None or not math.isfinite(nats):
        return "There is no bound on the information about the samples that this model still holds."
    gain = advantage(nats)
    return (
        f"At most {quantity(nats)} nats ({quantity(nats / math.log(2))} bits) of information about the samples are "
        "left in the weights. In plain words: somebody is handed, by the toss of a coin, either this model or one that "
        "was never shown the samples, and has any test they like and all the computers there are. They say which one "
        f"it is with an advantage of at most {percent(gain)} over guessing (true less false alarms): they are right in "
        f"at most {percent((1 + gain) / 2)} of cases, where guessing is right in 50 %."
    )


def noise_in_words(noise: Report | None) -> str:
    """Which noise was added.

    Args:
        noise: The noise of the report.

    Returns:
        A phrase.

    Example:
        >>> noise_in_words({"kind": "isotropic", "sigma": 0.001}), noise_in_words(None)
        ('isotropic, sigma 0.001', 'none')
    """
    if noise is None:
        return "none"
    rest = [f"{name} {quantity(value)}" for name, value in noise.items() if name != "kind"]
    return ", ".join([str(noise["kind"]), *rest])


def read_out(name: str, value: float | None) -> str:
    """Write a read-out.

    Args:
        name: Its name in the report.
        value: Its value; None where it was not measured.

    Returns:
        Text.

    Example:
        >>> read_out("forget_error", 0.159), read_out("tug_of_war", 0.98), read_out("relearn_steps", None)
        ('15.9 %', '0.98', 'not measured')
    """
    return percent(value) if name in _SHARES else quantity(value)


def percent(value: float | None) -> str:
    """Write a share.

    Args:
        value: Between 0 and 1; None where it was not measured.

    Returns:
        Text such as "15.9 %".

    Example:
        >>> percent(0.159), percent(0.00012), percent(None)
        ('15.9 %', '0.012 %', 'not measured')
    """
    return "not measured" if value is None else f"{quantity(100 * value)} %"


def quantity(value: object) -> str:
    """Write a number with three digits that count, or more where it is whole.

    Args:
        value: A number; None where it was not measured. Text stays as it is.

    Returns:
        Text.

    Example:
        >>> quantity(0.0123456), quantity(3_400_000), quantity(3.4e-9), quantity(713.4), quantity(None)
        ('0.0123', '3,400,000', '3.4e-09', '713', 'not measured')
    """
    if value is None:
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "infinite" if value == math.inf else "undefined"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
