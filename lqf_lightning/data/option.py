"""Options of the data, checked where they come in."""


def check_option(name: str, value: object, valid: bool, expected: str, example: object, group: str = "data") -> None:
    """Refuse a value outside the range of an option.

    Args:
        name: Name of the option in its config group.
        value: What was set.
        valid: Whether it is in range.
        expected: The range in words.
        example: A value to suggest.
        group: The config group.

    Raises:
        ValueError: The value is not valid.
    """
    if not valid:
        raise ValueError(f"`{name}` must be {expected}, got {value}. Set {group}.{name}={example}")
