"""What all training methods share: steps, metrics, optimizers and exact resumption."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lqf_lightning.backbones import Backbone
from lqf_lightning.data import Batch, Stream
from lqf_lightning.methods.averaging import Averaging
from lqf_lightning.methods.classification_metrics import NO_SAMPLE, classification_metrics
from lqf_lightning.methods.divergence import refuse_divergence
from lqf_lightning.methods.known_groups import known_groups
from lqf_lightning.methods.run_state import RunState
from lqf_lightning.methods.sample_mean import SampleMean
from lqf_lightning.methods.sample_weighting import SampleWeighting
from lqf_lightning.methods.schedule import scheduled_steps

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
NO_DECAY = "_no_decay"  # ends the name of a parameter group that leaves weight decay out
_STAGES = ("val", "test")


class Method(Averaging, RunState, SampleWeighting):
    """A way to fine-tune a backbone; subclasses give `forward`, `loss` and the parameters that train.

    Steps return ``{"loss", "logits"}``, so that callbacks see every prediction beside its `Batch`. Metrics are
    torchmetrics objects, exact for any number of ranks and uneven shards, and named ``stage/name``.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names, in the order of the outputs.
        optimizer: Builds the optimizer from parameter groups; its `lr` is the rate of groups with factor 1.
        scheduler: Builds a per-step schedule from the optimizer and the number of steps; None keeps the rate.
        layers: Names of the layer groups that train; None means all.
        group_lr: Learning-rate factor per layer group, 1 where absent.
    """

    sweeps = 0  # how often an epoch goes through training samples as they are evaluated; 0: ordinary training batches
    stream = Stream()  # which training samples come, and in which views

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classes = list(classes)
        self.layers = known_groups(backbone, list(backbone.groups) if layers is None else list(layers), "layers")
        self.group_lr = dict(group_lr or {})
        known_groups(backbone, list(self.group_lr), "group_lr")
        if min(self.group_lr.values(), default=0) < 0:
            raise ValueError(f"factors must be at least 0, got {self.group_lr}. Set method.group_lr={{head: 10}}")
        self.make_optimizer, self.make_schedule = optimizer, scheduler
        self.train_loss, self.train_acc = SampleMean(), SampleMean()
        means = [f"{stage}_{name}" for stage in _STAGES for name in ("loss", "teacher_loss", "teacher_acc")]
        self.stage_means = nn.ModuleDict({name: SampleMean() for name in means})
        self.stage_metrics = nn.ModuleDict({f"{s}_metrics": classification_metrics(classes, s) for s in _STAGES})

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The data term of the training loss.

        Args:
            logits: Outputs (B, C).
            target: Class positions (B,).

        Returns:
            A scalar, averaged over the batch.

        Raises:
            NotImplementedError: The subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `loss`")

    def penalty(self) -> Tensor | float:
        """The part of the training objective that does not depend on data.

        Returns:
            A scalar, 0 unless the subclass adds one.
        """
        return 0.0

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by their names in the backbone.

        Returns:
            Name to parameter, for the chosen layer groups.
        """
        named = dict(self.backbone.model.named_parameters())
        return {name: named[name] for group in self.layers for name in self.backbone.groups[group]}

    def setup(self, stage: str) -> None:
        """Tell the data module which training batches are wanted; it may have served another method before.

        Args:
            stage: "fit", or another.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and hasattr(data, "sweeps"):
            data.sweeps, data.stream = self.sweeps, self.stream

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One step of optimization on one batch.

        Args:
            batch: Samples of this rank.
            batch_idx: Unused.

        Returns:
            The objective, penalty included, and the detached outputs.
        """
        logits = self(batch.input)
        noted = self.note_training(logits, batch)
        return noted | {"loss": noted["loss"] + self.penalty()}

    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The data term of the objective on a training batch, where it is more than the `loss` of evaluation.

        Args:
            logits: Outputs (B, C), B at least 1.
            batch: The samples that they belong to.

        Returns:
            A scalar, averaged over the batch.
        """
        return self.loss(logits, batch.target)

    def note_training(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Count outputs on training samples in ``train/loss`` and ``train/acc``.

        Args:
            logits: Outputs (B, C), B may be 0.
            batch: The samples that they belong to.

        Returns:
            The data term of the loss, and the detached outputs.
        """
        target = batch.target
        data_loss = self.training_loss(logits, batch) if len(target) else logits.sum()
        self.train_loss.update(data_loss.detach(), len(target))
        self.train_acc.update((logits.detach().argmax(-1) == target).float().mean(), len(target))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return {"loss": data_loss, "logits": logits.detach()}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Evaluate one validation batch.

        Args:
            batch: Samples of this rank, possibly none.
            batch_idx: Unused.

        Returns:
            Loss and outputs.
        """
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Evaluate one test batch.

        Args:
            batch: Samples of this rank, possibly none.
            batch_idx: Unused.

        Returns:
            Loss and outputs.
        """
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Tensor]:
        mean: Any = self.stage_means[f"{stage}_loss"]
        metrics: Any = self.stage_metrics[f"{stage}_metrics"]
        if len(batch.target):
            logits = self(batch.input)
            loss = self.loss(logits, batch.target)
            metrics.update(logits.float(), batch.target)
        else:  # a rank without samples takes part in the reductions all the same
            nothing = torch.zeros(1, len(self.classes), device=self.device)
            metrics.update(nothing, batch.target.new_full((1,), NO_SAMPLE))
            logits, loss = nothing[:0], nothing.sum()
        mean.update(loss, len(batch.target))
        self.log(f"{stage}/loss", mean, on_step=False, on_epoch=True)
        if self.teacher_predicts:
            self._evaluate_teacher(batch, stage)
        return {"loss": loss, "logits": logits}

    def _evaluate_teacher(self, batch: Batch, stage: str) -> None:
        means: dict[str, Any] = {name: self.stage_means[f"{stage}_{name}"] for name in ("teacher_loss", "teacher_acc")}
        if number := len(batch.target):
            logits = self.teacher_logits(batch.input)
            means["teacher_loss"].update(self.loss(logits, batch.target), number)
            means["teacher_acc"].update((logits.argmax(-1) == batch.target).double().mean(), number)
        for name, mean in means.items():
            self.log(f"{stage}/{name}", mean, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Report the validation metrics."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Report the test metrics."""
        self._report("test")

    def _report(self, stage: str) -> None:
        metrics: Any = self.stage_metrics[f"{stage}_metrics"]
        values = metrics.compute()  # reduced over ranks here, by counts
        metrics.reset()
        self.log_dict(values, sync_dist=True)  # equal on all ranks by now; this silences Lightning's advice

    def on_train_epoch_end(self) -> None:
        """Stop a run whose loss is no longer a number, on all ranks alike."""
        refuse_divergence(self.trainer.callback_metrics["train/loss"], self.current_epoch, self.trainer.optimizers[0])

    def groups(self) -> Iterator[dict[str, Any]]:
        """Parameters that share a learning rate: the layer groups that train.

        Yields:
            Parameter groups as optimizers take them, with a name.
        """
        trained = self.trained()
        for group in self.layers:
            if members := [trained[name] for name in self.backbone.groups[group] if name in trained]:
                yield {"params": members, "name": group}

    def configure_optimizers(self) -> Any:
        """One parameter group per trained layer group.

        Returns:
            What Lightning expects: an optimizer, with its per-step schedule where there is one.
        """
        optimizer = self.make_optimizer(list(self.groups()))
        for group in optimizer.param_groups:
            group["lr"] *= self.group_lr.get(group["name"].removesuffix(NO_DECAY), 1.0)
        if self.make_schedule is None:
            return optimizer
        scheduler = self.make_schedule(optimizer, scheduled_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
