"""Layer groups that options name."""

from collections.abc import Sequence

from lqf_lightning.backbones import Backbone


def known_groups(backbone: Backbone, names: Sequence[str], option: str) -> list[str]:
    """Check names of layer groups.

    Args:
        backbone: The network that has them.
        names: Names given by the user.
        option: Where they were given.

    Returns:
        The names, in the order of the network.

    Raises:
        ValueError: A name is unknown, or `layers` is empty.
    """
    unknown = [name for name in names if name not in backbone.groups]
    if unknown or (option == "layers" and not names):
        raise ValueError(
            f"`{option}` names layer groups of {backbone.name}, which are {list(backbone.groups)}; "
            f"got {unknown or list(names)}. Set method.{option} to some of them, or to null for all."
        )
    return [group for group in backbone.groups if group in names]
