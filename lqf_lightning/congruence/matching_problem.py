"""A linear-quadratic problem with a reference to match."""

from dataclasses import dataclass

from torch import Tensor

from lqf_lightning.congruence.focal_filter import focal_weights
from lqf_lightning.congruence.matching import MatchedTargets, match_targets
from lqf_lightning.linear import QuadraticProblem


@dataclass(frozen=True)
class MatchingProblem:
    """A linear-quadratic problem, and a reference to match in it.

    Attributes:
        labels: The problem without the reference: targets of the labels, no sample weights.
        reference: What the outputs are to match, z (n, C), on the scale of the targets.
        old_right: Whether the reference is right (n,), boolean.
        old_position: Class positions of the reference (n,), -1 where it does not know the class.

    Raises:
        ValueError: The problem has weights or linear terms, or the shapes do not fit.
    """

    labels: QuadraticProblem
    reference: Tensor
    old_right: Tensor
    old_position: Tensor

    def __post_init__(self) -> None:
        if self.labels.weight is not None or self.labels.linear is not None:
            raise ValueError("the problem of the labels must have neither sample weights nor linear terms")
        shapes = [tuple(values.shape) for values in (self.reference, self.old_right, self.old_position)]
        samples = (self.labels.samples,)
        if shapes != [tuple(self.labels.target.shape), samples, samples]:
            raise ValueError(f"expected reference (n, C) and two values per sample, n = {samples[0]}; got {shapes}")

    def targets(self, alpha: float, beta: float) -> MatchedTargets:
        """Targets and sample weights that stand for labels and reference together.

        Args:
            alpha: Weight of matching for every sample whose class the reference knows.
            beta: What is added where the reference is right.

        Returns:
            The targets.
        """
        focus = focal_weights(self.old_right.double(), self.old_position, alpha, beta)
        return match_targets(self.labels.target.double(), self.reference.double(), focus)

    def at(self, alpha: float, beta: float) -> QuadraticProblem:
        """The problem of one strength.

        Args:
            alpha: See `targets`.
            beta: See `targets`.

        Returns:
            The problem, whose objective lacks the sum of `MatchedTargets.constant`.
        """
        matched = self.targets(alpha, beta)
        return self.labels.with_(target=matched.target, weight=matched.weight)
