"""One number for how near a scrubbed model's accuracies are to the retrained ones."""

from collections.abc import Mapping


def tug_of_war(accuracy: Mapping[str, float], reference: Mapping[str, float]) -> float:
    r"""Product over sets of samples of one minus the difference in accuracy (ToW, Zhao et al., NeurIPS 2024).

    .. math:: \prod_{S} \bigl(1 - \lvert a_{scrubbed}(S) - a_{retrained}(S) \rvert\bigr)

    Args:
        accuracy: Accuracy of the scrubbed model in [0, 1] by set: the cohort, the retained samples and the test set.
        reference: The same of the retrained model.

    Returns:
        A number in [0, 1]; 1 if and only if all accuracies are equal.

    Raises:
        ValueError: The sets differ, there is none, or an accuracy is outside of [0, 1].

    Example:
        >>> sets = {"forget": 0.5, "retain": 1.0, "test": 0.9}
        >>> tug_of_war(sets, sets), tug_of_war(sets | {"forget": 1.0}, sets)
        (1.0, 0.5)
    """
    if not accuracy or set(accuracy) != set(reference):
        raise ValueError(f"expected accuracies on the same sets, got {sorted(accuracy)} and {sorted(reference)}")
    product = 1.0
    for name, value in accuracy.items():
        if not (0 <= value <= 1 and 0 <= reference[name] <= 1):
            raise ValueError(f"accuracies are in [0, 1], got {value} and {reference[name]} on {name!r}")
        product *= 1 - abs(value - reference[name])
    return product
