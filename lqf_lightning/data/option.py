"""Options of the data module, checked where they come in."""


def check_option(name: str, value: object, valid: bool, expected: str, example: object) -> None:
    """Refuse a value outside the range of an option.

    Args:
        name: Name of the option in the config group `data`.
        value: What was set.
        valid: Whether it is in range.
        expected: The range in words.
        example: A value to suggest.

    Raises:
        ValueError: The value is not valid.
    """
    if not valid:
        raise ValueError(f"`{name}` must be {expected}, got {value}. Set data.{name}={example}")
