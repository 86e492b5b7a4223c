"""Errors of opening a model, told by the option that names it in a comparison."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The option's name of other commands: in advice ("Set reference to ..."), assigned ("reference=...") or in backquotes;
# not within paths, where folders may be called after overrides.
_ELSEWHERE = re.compile(r"(?<=[Ss]et )reference\b|(?<![^\s'])reference(?==)|(?<=`)reference(?=`)")


@contextmanager
def errors_of(option: str, given: Any) -> Iterator[None]:
    """Tell errors by an option of this command, not by `reference`, which it does not have.

    Args:
        option: "old" or "new".
        given: Its value.

    Yields:
        Nothing.

    Raises:
        FileNotFoundError: As it was raised within, in other words.
        TypeError: Likewise.
        ValueError: Likewise.

    Example:
        >>> with errors_of("old", "a.parquet"):
        ...     raise ValueError("it is damaged. Set reference to another")
        Traceback (most recent call last):
        ValueError: old=a.parquet: it is damaged. Set old to another
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(_reworded(error, option, given)) from error
    except TypeError as error:
        raise TypeError(_reworded(error, option, given)) from error
    except ValueError as error:
        raise ValueError(_reworded(error, option, given)) from error


def _reworded(error: Exception, option: str, given: Any) -> str:
    text = _ELSEWHERE.sub(option, str(error))
    return text if text.startswith(f"{option}=") else f"{option}={given}: {text}"
