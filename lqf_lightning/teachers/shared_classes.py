"""Which outputs of two models mean the same class."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SharedClasses:
    """Classes of a new and an old model, matched by name, never by position.

    Args:
        new: Class names of the new model, in the order of its outputs.
        old: Class names of the old model, in the order of its outputs.

    Attributes:
        names: Classes that both know, in the order of the new model.
        new_columns: Their positions among the new model's outputs (S,).
        old_columns: Their positions among the old model's outputs (S,).
        same: Whether both models know the same classes in the same order.

    Raises:
        ValueError: They share no class.

    Example:
        >>> shared = SharedClasses(["cat", "dog", "fox"], ["dog", "cat"])
        >>> shared.new_columns.tolist(), shared.old_columns.tolist()
        ([0, 1], [1, 0])
        >>> shared.old_position(torch.tensor([0, 1, 2])).tolist()
        [1, 0, -1]
    """

    def __init__(self, new: Sequence[str], old: Sequence[str]) -> None:
        known = {name: position for position, name in enumerate(old)}
        self.names = [name for name in new if name in known]
        if not self.names:
            raise ValueError(
                f"the new model's classes {_list(new)} and the old model's {_list(old)} share no name, so that their "
                "predictions cannot be compared. Set reference to a model of the same classes, or rename the folders"
            )
        self.same = list(new) == list(old)
        self._new, self._old = list(new), list(old)
        self._position = torch.tensor([known.get(name, -1) for name in new])
        self.new_columns = torch.tensor([position for position, name in enumerate(new) if name in known])
        self.old_columns = self._position[self.new_columns]

    def difference(self) -> str:
        """Tell which classes the old model lacks; that it knows more than the new one is nothing to remark on.

        Returns:
            A sentence for a log, empty if it lacks none.

        Example:
            >>> SharedClasses(["blue", "verde"], ["blue", "green"]).difference()[:71]
            'the old model does not know [verde]; it knows [green], which the data l'
        """
        shared = set(self.names)
        lacks, has = ([name for name in names if name not in shared] for names in (self._new, self._old))
        if not lacks:
            return ""
        instead = f"; it knows {_list(has)}, which the data lack" if has else ""
        return (
            f"the old model does not know {_list(lacks)}{instead}: classes are matched by name, and samples of others "
            "are left out of what is compared. Rename the class folders if they mean the same"
        )

    def old_position(self, target: Tensor) -> Tensor:
        """Translate class positions.

        Args:
            target: Positions among the new model's classes (B,).

        Returns:
            Positions among the old model's (B,), -1 for classes that it does not know.
        """
        return self._position.to(target.device)[target]

    def old_right(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Tell which samples the old model gets right, among all the classes that it knows.

        Args:
            outputs: Outputs of the old model (B, C_old).
            target: Positions among the new model's classes (B,).

        Returns:
            True or False (B,); False where the old model does not know the class.
        """
        return outputs.argmax(-1) == self.old_position(target)


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(list(names)[:5])}{', ...' if len(names) > 5 else ''}]"
