"""Fine-tuning that keeps right what an old model gets right."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F

from lqf_lightning.backbones import Backbone
from lqf_lightning.congruence.distances import ClassReduction
from lqf_lightning.congruence.focal_filter import FilterName, focal_mean, focal_weights, focus
from lqf_lightning.congruence.influence import influence_loss
from lqf_lightning.congruence.mixing import Mixing, mixed_objective
from lqf_lightning.data import Batch
from lqf_lightning.methods.finetune import Finetune
from lqf_lightning.methods.focal_refusals import old_head, refuse_classes, refuse_options, usable
from lqf_lightning.methods.method import OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.same_reference import refuse_other_reference
from lqf_lightning.methods.sample_mean import SampleMean
from lqf_lightning.methods.shared_distance import shared_distance
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, Reference, SharedClasses

log = logging.getLogger(__name__)
DistanceName = Literal["logits", "kl", "ldi", "none"]
_OBJECTIVE = (
    "alpha", "beta", "distance", "filter", "temperature", "class_reduction", "centered", "margin", "power", "top_k",
    "exclude_target", "one_sided", "strength", "mixing", "distillation_share", "influence",
)  # fmt: skip


class FocalDistillation(Finetune):
    r"""Distils an old model, most where it is right (Yan et al., Positive-Congruent Training, CVPR 2021, eq. 4).

    .. math:: \frac1B \sum_i CE(z^n_i, y_i) + \lambda\, \frac1B \sum_i (\alpha + \beta\, r_i)\, D(z^n_i, z^o_i)

    Both models see the same augmented images; the old one stays as it is, in eval mode. Classes are matched by name:
    distances are over those that both models know, and a sample whose class the old model does not know has weight 0
    there, while r asks whether the old model is right among all of its own classes. Evaluation needs no reference.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names, in the order of the outputs.
        reference: The old model, or an ensemble; needed for training only, and not part of checkpoints.
        optimizer: Builds the optimizer from parameter groups.
        scheduler: Builds a per-step schedule; None keeps the rate.
        distance: D: "logits" (squared difference), "kl" (of tempered probabilities), "ldi" (logit difference
            inhibition: a difference within a margin is free), or "none": the cross-entropy of samples in focus counts
            1 + lambda times, whatever alpha and beta (the naive remedy that the others are compared with).
        filter: What r is: "focal" (the old model is right), "negative_flip" (and the new one wrong), "new_wrong",
            "all", "likelihood" (the old probability of the label), or "better" (the old loss is not larger).
        alpha: Weight of every sample; 0 distils samples in focus alone.
        beta: Weight that focus adds; 0 is ordinary distillation.
        temperature: Divisor tau of the outputs in "kl".
        class_reduction: "mean" or "sum" (half, as printed in the paper) over classes in "logits".
        centered: Leave the mean difference of each sample out of "logits".
        margin: Difference that is free in "ldi".
        power: Exponent of what exceeds it in "ldi".
        top_k: Number of classes, those that the old model ranks highest, that count in "ldi"; None means all.
        exclude_target: Leave the label out of "ldi".
        one_sided: Only outputs that rise above the old ones count in "ldi".
        strength: The factor lambda.
        mixing: "paper": as above; "released": (1 - s) CE + s FD.
        distillation_share: The share s of "released"; `strength` has no effect there.
        influence: Weight of the loss that the old head has on the new features (Shen et al., CVPR 2020); 0 is off.
        batch_norm: "train" or "frozen".
        layers: Names of the layer groups that train; None means all.
        group_lr: Learning-rate factor per layer group, 1 where absent.
    """

    weighs_samples = False  # it has weights of its own

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        reference: Reference | None = None,
        scheduler: SchedulerFactory | None = None,
        distance: DistanceName = "logits",
        filter: FilterName = "focal",  # noqa: A002  the paper's word, and nothing here filters iterables
        alpha: float = 1.0,
        beta: float = 5.0,
        temperature: float = 100.0,
        class_reduction: ClassReduction = "mean",
        centered: bool = False,
        margin: float = 0.0,
        power: float = 2.0,
        top_k: int | None = None,
        exclude_target: bool = False,
        one_sided: bool = False,
        strength: float = 1.0,
        mixing: Mixing = "paper",
        distillation_share: float = 0.9,
        influence: float = 0.0,
        batch_norm: Literal["train", "frozen"] = "train",
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(
            backbone, classes, optimizer=optimizer, scheduler=scheduler, batch_norm=batch_norm, layers=layers,
            group_lr=group_lr,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "reference"], logger=False)
        self.hparams["reference_fingerprint"] = None if reference is None else reference.fingerprint
        self._reference = (reference,)  # a tuple keeps it out of the modules, and so out of checkpoints
        refuse_options(self.hparams)
        self.distance, self.filter, self.influence = distance, filter, influence
        self.train_cross_entropy, self.train_distillation = SampleMean(), SampleMean()
        self.train_reference_acc = SampleMean()
        self._features: list[Tensor] = []  # what entered the head in this step

    def setup(self, stage: str) -> None:
        """Match the reference with the network, or refuse it.

        Args:
            stage: "fit", or another, which needs no reference.
        """
        super().setup(stage)
        if stage == "fit":
            self._shared = self.match_classes()

    def match_classes(self) -> SharedClasses:
        """Find the classes that both models know.

        Returns:
            Where they are in the outputs of both.
        """
        teacher = self.old_model
        shared = SharedClasses(self.classes, teacher.classes)
        refuse_classes(self.hparams, shared)
        if (difference := shared.difference()) and self.trainer.is_global_zero:
            log.warning("%s: %s", teacher.name, difference)
        if self.hparams["influence"]:
            old_head(teacher, self.backbone)
        return shared

    def answers(self, images: Tensor) -> Tensor:
        """What the old model makes of images that were prepared for the new one.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Outputs (B, C_old), detached.
        """
        outputs: Tensor = self.old_model(images, self.backbone.mean, self.backbone.std)
        return outputs

    @property
    def old_model(self) -> FrozenTeacher | EnsembleTeacher:
        """The model in use."""
        return usable(self._reference[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on training for another objective; evaluation does not ask what that was."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            refuse_other_reference(checkpoint.get("hyper_parameters", {}), self.hparams, _OBJECTIVE)

    def on_fit_start(self) -> None:
        """Bring the old model to the device."""
        super().on_fit_start()
        if self._reference[0] is not None:
            self.old_model.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One step of optimization on one batch.

        Args:
            batch: Samples of this rank.
            batch_idx: Unused.

        Returns:
            The objective, and the detached outputs.
        """
        if not self.influence:
            return super().training_step(batch, batch_idx)
        head = self.model.get_submodule(self.backbone.head)
        handle = head.register_forward_pre_hook(lambda _, seen: self._features.append(seen[0]))
        try:
            return super().training_step(batch, batch_idx)
        finally:
            handle.remove()
            self._features.clear()

    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss on labels, and the distance to the old model.

        Args:
            logits: Outputs (B, C).
            batch: The samples that they belong to.

        Returns:
            A scalar, averaged over the batch.
        """
        options: Any = self.hparams
        outputs = self.answers(batch.input)
        old_target = self._shared.old_position(batch.target)
        losses = F.cross_entropy(logits, batch.target, reduction="none")
        in_focus = focus(self.filter, logits, outputs, batch.target, old_target)
        if self.distance == "none":
            distances, weights = losses, in_focus
        else:
            distances = shared_distance(self.hparams, self._shared, logits, outputs, batch.target)
            weights = focal_weights(in_focus, old_target, options.alpha, options.beta)
        cross_entropy, distillation = losses.mean(), focal_mean(distances, weights)
        self._note(cross_entropy, distillation, outputs.argmax(-1) == old_target, old_target)
        objective = mixed_objective(
            cross_entropy, distillation, options.mixing, options.strength, options.distillation_share
        )
        if self.influence:
            head = old_head(self.old_model, self.backbone)
            (features,) = self._features
            objective = objective + self.influence * influence_loss(features, head.weight, head.bias, old_target)
        return objective

    def note_training(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Count outputs on training samples, on a rank without samples too: it takes part in the reductions.

        Args:
            logits: Outputs (B, C), B may be 0.
            batch: The samples that they belong to.

        Returns:
            The data term of the loss, and the detached outputs.
        """
        if not len(batch.target):
            self._note(logits.sum(), logits.sum(), batch.target, batch.target)
        return super().note_training(logits, batch)

    def _note(self, cross_entropy: Tensor, distillation: Tensor, old_right: Tensor, old_target: Tensor) -> None:
        number = known = len(old_target)
        if len(self._shared.names) < len(self.classes):
            known = int((old_target >= 0).sum())
        self.train_cross_entropy.update(cross_entropy, number)
        self.train_distillation.update(distillation, number)
        # The default type of a run in bfloat16 has three digits.
        self.train_reference_acc.update(old_right.sum().double() / max(known, 1), known)
        self.log("train/cross_entropy", self.train_cross_entropy, on_step=False, on_epoch=True)
        self.log("train/distillation", self.train_distillation, on_step=False, on_epoch=True)
        self.log("train/reference_acc", self.train_reference_acc, on_step=False, on_epoch=True)
