"""A reference whose outputs `LQF` matches."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lqf_lightning.congruence.distances import logit_distance
from lqf_lightning.congruence.focal_filter import focal_mean, focal_weights
from lqf_lightning.congruence.matching import reference_targets
from lqf_lightning.congruence.matching_problem import MatchingProblem
from lqf_lightning.congruence.target_scale import TargetScale, fitted_scale, scale_sums
from lqf_lightning.data import Batch
from lqf_lightning.linear import QuadraticProblem, current_reducer
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, Reference, SharedClasses, StoredPredictions

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)


class LogitMatching:
    r"""Adds :math:`\frac{1}{2n} \sum_i F_i \lVert f_i - z_i \rVert^2` to the objective of `LQF`.

    It is the logit matching of Positive-Congruent Training (Yan et al., CVPR 2021, eqs. 5, 6 and 9), on outputs that
    have a scale: :math:`F_i = \alpha + \beta r_i` where the reference knows the class of the sample, else 0, and
    :math:`r_i` says whether it is right, among all of its own classes. Classes are matched by name; outputs for
    classes that the reference does not know match the label's target.

    The targets z are its outputs o times a number, or with "auto" :math:`k (o - \bar o) + s / S`, over the S classes
    that both models know, with k fitted by least squares to the label targets of scale s on the training samples whose
    class it knows; their order stays.

    Args:
        method: The method; does not own the reference, so that checkpoints do not hold it.
        reference: The model in use today, or its stored predictions.
        alpha: Weight of matching for every sample.
        beta: What is added where the reference is right.
        scale: "auto", or what its outputs are multiplied with.
        tradeoff: Values of `alpha` and `beta` whose combinations are compared on the validation set; None: none.

    Attributes:
        shared: The classes that both know.

    Raises:
        ValueError: The scale is to be fitted, and there are not two classes that both know.
    """

    def __init__(
        self,
        method: "LQF",
        reference: Reference,
        *,
        alpha: float,
        beta: float,
        scale: float | Literal["auto"],
        tradeoff: Mapping[str, Iterable[float]] | None = None,
    ) -> None:
        self.method, self.reference, self.alpha, self.beta = method, reference, alpha, beta
        self.tradeoff = tradeoff
        self.shared = SharedClasses(method.classes, reference.classes)
        self._fitted = scale == "auto"
        if self._fitted and len(self.shared.names) < 2:
            raise ValueError(
                f"reference_scale=auto compares outputs of different classes, but {reference.name} shares only "
                f"{self.shared.names} with the data. Set method.reference_scale=1.0 to match its outputs as they are, "
                "or reference to a model that knows more of the classes, which are matched by name"
            )
        self._scale = None if scale == "auto" else TargetScale(float(scale))
        self._answers: tuple[Tensor, Tensor] | None = None  # index and outputs of fixed training images

    @property
    def heaviest(self) -> float:
        """The largest weight that a sample can have."""
        return 1.0 + self.alpha + self.beta

    @property
    def loss_of_nothing(self) -> float:
        """Loss of predicting zeros, at most: a fitted reference is no longer than the targets; of others, no bound."""
        return 0.5 * self.heaviest * self.method.target_scale**2 if self._fitted else math.inf

    def start(self) -> None:
        """Bring the reference to the device, forget what an earlier fit has found out, and tell of other classes."""
        if (difference := self.shared.difference()) and self.method.trainer.is_global_zero:
            log.warning("%s: %s", self.reference.name, difference)
        self._answers = None
        if not isinstance(self.reference, StoredPredictions):
            self.reference.to(self.method.device)

    def outputs(self, batch: Batch) -> Tensor:
        """What the reference answers, on the images as they are unless its answers are known.

        Args:
            batch: Training samples, at least one.

        Returns:
            Outputs (B, C_old), not scaled.
        """
        if self._answers is not None:
            index, rows = self._answers
            return rows[torch.searchsorted(index, batch.index)]
        if isinstance(self.reference, StoredPredictions):
            return self.reference.look_up(batch.index)
        return self._ask(self.reference, batch)

    def predictions(self, batch: Batch) -> Tensor:
        """What the reference predicts.

        Args:
            batch: Validation samples, at least one.

        Returns:
            Positions among the classes of the reference (B,).
        """
        if isinstance(self.reference, StoredPredictions):
            return self.reference.predictions(batch.index)[0]
        return self._ask(self.reference, batch).argmax(-1)

    def remember(self, index: Tensor, outputs: Tensor) -> None:
        """Keep the answers on training images that do not change from epoch to epoch.

        Args:
            index: Of the samples of all ranks (n,), ascending.
            outputs: Their outputs (n, C_old).
        """
        self._answers = index, outputs

    def settle_scale(self, outputs: Tensor, label: Tensor) -> None:
        """Fit the scale, if it is to be fitted.

        Args:
            outputs: Outputs on all training samples (n, C_old).
            label: Class positions (n,).
        """
        self._settle(self._sums(outputs, label))

    def settle_scale_by(self, batches: Iterable[Batch]) -> None:
        """Fit the scale, if it is to be fitted, from training samples of which only sums are kept.

        Args:
            batches: Those of this rank.
        """
        if self._fitted:
            sums = torch.zeros(2, dtype=torch.float64, device=self.method.device)
            for batch in batches:
                if len(batch.target):
                    sums += self._sums(self.outputs(batch), batch.target).to(sums)
            self._settle(current_reducer().sum_(sums))

    def problem(self, labels: QuadraticProblem, outputs: Tensor, label: Tensor) -> MatchingProblem:
        """Labels and reference on fixed images.

        Args:
            labels: The problem without the reference.
            outputs: What the reference answers (n, C_old).
            label: Class positions (n,).

        Returns:
            What every strength of matching makes a problem of.
        """
        old_position = self.shared.old_position(label)
        old_right = self.shared.old_right(outputs, label)
        return MatchingProblem(labels, self._targets(labels.target, outputs), old_right, old_position)

    def penalty(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The matching term on a batch.

        Args:
            outputs: Outputs of the method (B, C).
            batch: The samples that they belong to.

        Returns:
            A scalar, averaged over the batch.
        """
        answers, dtype = self.outputs(batch), torch.promote_types(outputs.dtype, torch.float32)
        old_right = self.shared.old_right(answers, batch.target)
        focus = focal_weights(old_right.to(dtype), self.shared.old_position(batch.target), self.alpha, self.beta)
        label_target = self.method.target_scale * one_hot(batch.target, outputs.shape[1]).to(dtype)
        return focal_mean(logit_distance(outputs, self._targets(label_target, answers), "sum"), focus)

    def _ask(self, teacher: FrozenTeacher | EnsembleTeacher, batch: Batch) -> Tensor:
        outputs: Tensor = teacher(batch.input, self.method.backbone.mean, self.method.backbone.std)
        return outputs

    def _targets(self, label_target: Tensor, outputs: Tensor) -> Tensor:
        if self._scale is None:
            raise RuntimeError("the scale of the reference is not settled: call `settle_scale` before")
        chosen = outputs[:, self.shared.old_columns.to(outputs.device)].to(label_target)
        return reference_targets(label_target, self._scale(chosen), self.shared.new_columns)

    def _sums(self, outputs: Tensor, label: Tensor) -> Tensor:
        position = torch.full((len(self.method.classes),), -1, device=label.device)
        position[self.shared.new_columns.to(label.device)] = torch.arange(len(self.shared.names), device=label.device)
        return scale_sums(outputs[:, self.shared.old_columns.to(outputs.device)], position[label])

    def _settle(self, sums: Tensor) -> None:
        if self._fitted:
            self._scale = fitted_scale(sums, self.method.target_scale, len(self.shared.names))
            log.info("outputs of %s are multiplied by %.4g, to be targets", self.reference.name, self._scale.factor)
