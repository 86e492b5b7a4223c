"""Linear quadratic fine-tuning: a network's first-order expansion, trained by a squared loss."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lqf_lightning.backbones import Backbone
from lqf_lightning.linear import KFAC, LinearizedModel, current_reducer, top_curvature
from lqf_lightning.methods.losses import LossName, choose_loss
from lqf_lightning.methods.method import Method, OptimizerFactory, SchedulerFactory
from lqf_lightning.progress import track

Preconditioner = Callable[..., KFAC]
log = logging.getLogger(__name__)
_CHUNK = 32  # samples in flight while curvature is measured
_MEASURED = 128  # samples that the top curvature is measured on, in batches
_MOST_BATCHES = 8
_HOPELESS = 10.0  # times the loss of predicting nothing


class LQF(Method):
    r"""Fits ``f0(x) + J(x) dw`` to scaled one-hot targets (Achille et al., LQF, CVPR 2021).

    .. math:: \frac{1}{2n} \sum_i \lVert f_0(x_i) + J(x_i)\,dw - \alpha e_{y_i} \rVert^2
        + \frac{\mu}{2} \lVert dw \rVert^2

    The expansion is taken at the pre-trained weights with batch-norm statistics frozen, so the problem is a convex
    quadratic in ``dw``. Predict with this model, never with the network at ``w0 + dw``: that is another function.

    Args:
        backbone: The network, its (random, non-zero) head and its layer groups.
        classes: Class names, in the order of the outputs.
        optimizer: Builds the optimizer from parameter groups; its own weight decay must be 0.
        scheduler: Builds a per-step schedule; None keeps the rate.
        loss: "squared", or "cross_entropy" (the paper's ablation; no longer quadratic).
        target_scale: Value alpha of the right class.
        ridge: Strength mu of the penalty, in the mean form above. It enters the gradient before the preconditioner.
        layers: Names of the layer groups that are linearized; None means all, ``[head]`` is a linear probe.
        group_lr: Learning-rate factor per layer group, 1 where absent.
        preconditioner: Fits Kronecker factors of the Gauss-Newton matrix once, before the first step; None trains on
            the plain gradient.
        preconditioner_samples: Training samples that the factors are computed from; None means all.
        normalize_step: Divide directions by the largest curvature that some training batches have after
            preconditioning: on these, learning rates below 2 are stable (below 3.8 with heavy-ball momentum of 0.9),
            whatever the network. Other batches can be steeper, small ones above all. Adaptive optimizers do not
            notice it.
    """

    moves_buffers = False  # broadcasting the frozen ones would only make the linearized model fold them again

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        loss: LossName = "squared",
        target_scale: float = 15.0,
        ridge: float = 1e-3,
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
        preconditioner: Preconditioner | None = None,
        preconditioner_samples: int | None = None,
        normalize_step: bool = True,
    ) -> None:
        super().__init__(backbone, classes, optimizer=optimizer, scheduler=scheduler, layers=layers, group_lr=group_lr)
        if not 0 <= ridge < math.inf:
            raise ValueError(f"`ridge` must be at least 0 and finite, got {ridge}. Set method.ridge=1e-3")
        if preconditioner_samples is not None and preconditioner_samples < 1:
            raise ValueError(
                f"`preconditioner_samples` must be null (all) or at least 1, got {preconditioner_samples}. "
                "Set method.preconditioner_samples=1000"
            )
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "preconditioner"], logger=False)
        self.ridge = ridge
        self.squared, self.target_scale = loss == "squared", target_scale
        self._loss = choose_loss(loss, target_scale)
        self._preconditioner, self._preconditioner_samples = preconditioner, preconditioner_samples
        self.normalize_step = normalize_step
        self.kfac: KFAC | None = None
        self.top_curvature = 1.0
        side = backbone.image_size
        names = [name for group in self.layers for name in backbone.groups[group]]
        self.linearized = LinearizedModel(backbone.model, names, example=torch.randn(2, 3, side, side))

    def forward(self, images: Tensor) -> Tensor:
        """Outputs of the linearized network.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Outputs (B, C), on the scale of the targets.
        """
        outputs: Tensor = self.linearized(images)
        return outputs

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The chosen data term.

        Args:
            logits: Outputs (B, C).
            target: Class positions (B,).

        Returns:
            A scalar, averaged over the batch.
        """
        return self._loss(logits, target)

    def penalty(self) -> Tensor | float:
        """Half the ridge times the squared distance from the pre-trained weights.

        Returns:
            A scalar.
        """
        if self.ridge == 0:
            return 0.0
        norms = torch._foreach_norm(list(self.linearized.deltas.values()))
        return 0.5 * self.ridge * torch.stack(list(norms)).square().sum()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters dw, by the names of the weights they change.

        Returns:
            Name to parameter.
        """
        return self.linearized.deltas

    def configure_optimizers(self) -> Any:
        """One parameter group per linearized layer group.

        Returns:
            What Lightning expects.

        Raises:
            ValueError: The optimizer decays weights by itself.
        """
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        decay = {group.get("weight_decay", 0) for group in optimizer.param_groups}
        if decay != {0}:
            raise ValueError(
                f"lqf penalizes dw through `ridge`, before the preconditioner; got an optimizer with weight_decay "
                f"{decay}. Set method.optimizer.weight_decay=0 and method.ridge instead."
            )
        return configured

    def on_fit_start(self) -> None:
        """Fit the preconditioner and measure the step at w0; nothing that training changes enters them.

        Raises:
            TypeError: The strategy divides the model itself, which forward-mode differentiation does not allow.
        """
        strategy = type(self.trainer.strategy).__name__
        if not isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise TypeError(f"lqf runs on one device or under DDP, got {strategy}. Set trainer.strategy=ddp")
        if self._preconditioner is not None:
            self.kfac = self._preconditioner(
                self.linearized,
                None,
                self._inputs(self._preconditioner_samples),
                damping=self.ridge,
                reducer=current_reducer(),
                watch=partial(track, description="Kronecker factors: inverses"),
            )
        if self.normalize_step:
            self.top_curvature = self._measure_top_curvature()
            log.info("learning rates are divided by the top curvature of a batch, %.4g", self.top_curvature)

    def _measure_top_curvature(self) -> float:
        # Small batches differ more among themselves: several are measured, and the steepest counts.
        data = self._data()
        size, samples = data.batch_size, len(data.fixed_train_dataloader().dataset)
        return max(
            top_curvature(
                self.linearized,
                list(self._inputs(size, start=number * size)),
                ridge=self.ridge,
                precondition=self.kfac.precondition if self.kfac else dict,
                reducer=current_reducer(),
            )
            for number in range(max(1, min(_MEASURED // size, _MOST_BATCHES, samples // size)))
        )

    def _data(self) -> Any:
        data = cast(Any, self.trainer).datamodule
        if not hasattr(data, "fixed_train_dataloader"):
            raise TypeError(
                "LQF measures curvature on training samples before the first step, from the data module's "
                f"`fixed_train_dataloader()`; got {type(data).__name__}. Use ImageDataModule, give yours that method, "
                "or set method/preconditioner=null and method.normalize_step=false"
            )
        return data

    def _inputs(self, count: int | None, start: int = 0) -> Iterator[Tensor]:
        # This rank's share of `count` random training samples, as evaluated: files are often sorted by class.
        loader = self._data().fixed_train_dataloader()
        order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))[start:][:count]
        own = order[self.trainer.global_rank :: self.trainer.world_size].tolist()
        batches = DataLoader(
            Subset(loader.dataset, own), _CHUNK, collate_fn=loader.collate_fn, num_workers=loader.num_workers
        )
        for batch in track(batches, "samples for the preconditioner", total=len(batches)):
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            yield self.trainer.precision_plugin.convert_input(batch).input

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Precondition and scale the gradient, which holds the penalty's by now.

        Args:
            optimizer: Unused.
        """
        deltas = self.linearized.deltas
        gradients = {n: torch.zeros_like(d) if d.grad is None else d.grad for n, d in deltas.items()}
        directions = self.kfac.precondition(gradients) if self.kfac else gradients
        for name, direction in directions.items():
            deltas[name].grad = direction / self.top_curvature

    def on_train_epoch_end(self) -> None:
        """Stop a run that gets worse than predicting nothing, on all ranks alike.

        Raises:
            FloatingPointError: The loss is not finite, or beyond what steps of the right length can give.
        """
        super().on_train_epoch_end()
        loss, nothing = float(self.trainer.callback_metrics["train/loss"]), 0.5 * self.target_scale**2
        if self.squared and loss > _HOPELESS * nothing:
            raise FloatingPointError(
                f"the training loss of epoch {self.current_epoch} is {loss:.3g}, that of predicting zeros about "
                f"{nothing:.3g}: training diverges. Set method.optimizer.lr lower, or data.batch_size higher. "
                "Checkpoints of earlier epochs are kept."
            )
