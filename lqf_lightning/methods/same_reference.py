"""Whether a run goes on with the objective that it began with."""

from collections.abc import Mapping, Sequence
from typing import Any

_REFERENCE = "reference_fingerprint"


def refuse_other_reference(stored: Mapping[str, Any], now: Mapping[str, Any], options: Sequence[str]) -> None:
    """Check that a fit goes on from a checkpoint with the same reference, held to it as strongly.

    A checkpoint that does not say which reference it is of is taken as it is, and so are options that it does not
    know. Without a reference, before and now, the options mean nothing.

    Args:
        stored: Hyper-parameters in the checkpoint; `reference_fingerprint` is None where there was no reference.
        now: Those of the run.
        options: Names of the options that the objective is made of.

    Raises:
        ValueError: The reference or an option has changed.
    """
    if stored.get(_REFERENCE) is None and now[_REFERENCE] is None:
        return
    names = [name for name in (_REFERENCE, *options) if name in stored and stored[name] != now[name]]
    if names:
        changes = "; ".join(f"{name} was {stored[name]} and is {now[name]} now" for name in names)
        raise ValueError(
            f"the checkpoint to go on from was trained for another objective: {changes}. Set hydra.run.dir to another "
            "folder, or ckpt_path=null to start over"
        )
