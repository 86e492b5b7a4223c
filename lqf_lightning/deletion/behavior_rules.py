"""Whether a scrubbed model behaves like a retrained one, up to the error of the comparison."""

import math
from collections.abc import Mapping
from typing import Any

from lqf_lightning.deletion.report_words import ATTACKS, QUANTITIES, percent, quantity, read_out

Report = Mapping[str, Any]
ERRORS = (
    3.0  # standard errors that chance may explain; of five comparisons one exceeds them by chance in 1.3 % of cases
)
_PARTS = {"retain_error": "retain", "forget_error": "forget", "test_error": "test"}


def behavior_failures(report: Report) -> list[str]:
    """In what the scrubbed model differs from the retrained one by more than chance explains.

    - Errors on retained, forgotten and test samples: more than 3 standard errors of a difference of two shares.
      Both models answer the same samples, which makes the true error smaller: the rule is lenient.
    - Attack scores: more than 3 standard errors, in either direction; a model that is *less* a member than the
      retrained one gives its scrub away, too.
    - Distance of the answers on the forgotten samples: more than half of what it was before the scrub. If noise was
      added, it must also be 1.25 times that on test samples, since noise moves all answers.

    Args:
        report: The report.

    Returns:
        Sentences.
    """
    models = (report.get("read_outs") or {}).get("models") or {}
    scrubbed, retrained = models.get("scrubbed"), models.get("retrained")
    if scrubbed is None or retrained is None:
        return []
    differences = [_share(report, name, scrubbed, retrained) for name in _PARTS]
    differences += [_attack(name, scrubbed, retrained) for name in ATTACKS]
    differences.append(_distance(report, models))
    return [sentence for sentence in differences if sentence]


def behavior_cautions(report: Report) -> list[str]:
    """What of the behavior was not compared, or is no test but worth a look.

    Args:
        report: The report.

    Returns:
        Sentences.
    """
    models = (report.get("read_outs") or {}).get("models") or {}
    if "scrubbed" not in models:
        return ["The behavior of the scrubbed model was not measured."]
    if "retrained" not in models:
        return [
            "There is no retrained model to compare with, so no attack score says anything. Run again with retrained=, "
            "the checkpoint of a model that was trained without the samples."
        ]
    index = models["scrubbed"].get("anamnesis_index")
    if index is not None and not index >= 0.5:
        return [f"It relearns the samples in {quantity(index)} of the steps that the retrained model needs: a trace?"]
    return []


def counts_of(report: Report) -> dict[str, int | None]:
    """How many samples the shares are of.

    Args:
        report: The report; without `counts` beside the read-outs, all retained and all forgotten samples count.

    Returns:
        Number for "retain", "forget" and "test"; None where it is not known.
    """
    request = report["request"]
    given = (report.get("read_outs") or {}).get("counts") or {}
    return {"retain": request["train_after"], "forget": request["number"], "test": None} | dict(given)


def share_error(first: float, second: float, count: int) -> float:
    """The standard error of the difference of two shares of equally many samples.

    Args:
        first: A share.
        second: Another one.
        count: Number of samples of each. For the variance one success and one failure are added to both, so that
            shares of 0 and 1 have an error, too.

    Returns:
        Standard error, if both have the same true share.

    Example:
        >>> round(share_error(0.1, 0.1, 98), 9)
        0.044340059
    """
    pooled = min(max(((first + second) * count + 2) / (2 * count + 4), 0.0), 1.0)
    return math.sqrt(2 * pooled * (1 - pooled) / count)


def _share(report: Report, name: str, scrubbed: Report, retrained: Report) -> str:
    count = counts_of(report)[_PARTS[name]]
    if count is None or scrubbed.get(name) is None or retrained.get(name) is None:
        return ""
    error = share_error(scrubbed[name], retrained[name], count)
    return _beyond(name, scrubbed, retrained, error)


def _attack(name: str, scrubbed: Report, retrained: Report) -> str:
    needed = [model.get(key) for model in (scrubbed, retrained) for key in (name, ATTACKS[name])]
    if None in needed:
        return ""
    error = math.hypot(scrubbed[ATTACKS[name]], retrained[ATTACKS[name]])
    return _beyond(name, scrubbed, retrained, error)


def _beyond(name: str, scrubbed: Report, retrained: Report, error: float) -> str:
    if abs(scrubbed[name] - retrained[name]) <= ERRORS * error:
        return ""
    return (
        f"It does not behave like the retrained model: {QUANTITIES[name][0]} {read_out(name, scrubbed[name])} against "
        f"{read_out(name, retrained[name])}, more than {ERRORS:g} standard errors "
        f"({read_out(name, error)}) apart."
    )


def _distance(report: Report, models: Report) -> str:
    before, after = (_distances(models, name) for name in ("original", "scrubbed"))
    if before.get("forget") is None or after.get("forget") is None:
        return ""
    near = after["forget"] <= 0.5 * before["forget"]
    noisy = report["scrub"].get("noise") is not None and after.get("test") is not None
    if near or (noisy and after["forget"] <= 1.25 * after["test"]):
        return ""
    share = percent(after["forget"] / before["forget"]) if before["forget"] > 0 else "more than all"
    return (
        f"Its answers on the forgotten samples are still {quantity(after['forget'])} away from the retrained model's, "
        f"{share} of what they were before the scrub."
    )


def _distances(models: Report, name: str) -> Report:
    found: Report = (models.get(name) or {}).get("activation_distance") or {}
    return found
