"""How much faster a scrubbed model relearns what it forgot than one that never knew it."""


def anamnesis_index(steps: int | None, retrained: int | None) -> float | None:
    r"""Relearn time of the scrubbed model over that of the retrained one (AIN, Chundawat et al., AAAI 2023).

    1 is ideal; less than 1 says that something is left, more than 1 that the samples stand out as forgotten. There is
    no ratio to a retrained model that needs no step at all: then the index is 1 if the scrubbed model needs none
    either, and otherwise unknown, as it is if one of the two has not relearned in the time allowed.

    Args:
        steps: Steps that the scrubbed model took to relearn, None if it did not.
        retrained: Steps of the retrained model, None if it did not.

    Returns:
        The index; None where it does not exist.

    Raises:
        ValueError: A number of steps is negative.

    Example:
        >>> anamnesis_index(30, 40), anamnesis_index(0, 0), anamnesis_index(5, 0)
        (0.75, 1.0, None)
    """
    if min(steps or 0, retrained or 0) < 0:
        raise ValueError(f"numbers of steps cannot be negative, got {steps} and {retrained}")
    if steps is None or retrained is None:
        return None
    if retrained == 0:
        return 1.0 if steps == 0 else None
    return steps / retrained
