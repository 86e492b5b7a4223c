"""Linear quadratic fine-tuning: a network's first-order expansion, trained by a squared loss."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lqf_lightning.backbones import Backbone
from lqf_lightning.linear import KFAC, LinearizedModel, current_reducer
from lqf_lightning.methods.losses import LossName, choose_loss
from lqf_lightning.methods.method import Method, OptimizerFactory, SchedulerFactory
from lqf_lightning.progress import track

Preconditioner = Callable[..., KFAC]


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
        ridge: float = 1e-4,
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
        preconditioner: Preconditioner | None = None,
        preconditioner_samples: int | None = 1000,
    ) -> None:
        super().__init__(backbone, classes, optimizer=optimizer, scheduler=scheduler, layers=layers, group_lr=group_lr)
        if not 0 <= ridge < math.inf:
            raise ValueError(f"`ridge` must be at least 0 and finite, got {ridge}. Set method.ridge=1e-4")
        if preconditioner_samples is not None and preconditioner_samples < 1:
            raise ValueError(
                f"`preconditioner_samples` must be null (all) or at least 1, got {preconditioner_samples}. "
                "Set method.preconditioner_samples=1000"
            )
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "preconditioner"], logger=False)
        self.ridge = ridge
        self._loss = choose_loss(loss, target_scale)
        self._preconditioner, self._preconditioner_samples = preconditioner, preconditioner_samples
        self.kfac: KFAC | None = None
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
        """Fit the preconditioner at w0; nothing that training changes enters it."""
        super().on_fit_start()
        if self._preconditioner is None:
            return
        self.kfac = self._preconditioner(
            self.linearized,
            None,
            self._factor_inputs(),
            damping=self.ridge,
            reducer=current_reducer(),
        )

    def _factor_inputs(self) -> Iterator[Tensor]:
        loader = cast(Any, self.trainer).datamodule.fixed_train_dataloader()
        wanted = self._preconditioner_samples or len(loader.dataset)
        left = -(-wanted // self.trainer.world_size)
        for batch in track(loader, "Kronecker factors", total=len(loader)):
            yield self.transfer_batch_to_device(batch, self.device, 0).input[:left]
            left -= len(batch.target)
            if left <= 0:
                return

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Precondition the gradient, which holds the penalty's by now.

        Args:
            optimizer: Unused.
        """
        if self.kfac is None:
            return
        deltas = self.linearized.deltas
        gradients = {n: torch.zeros_like(d) if d.grad is None else d.grad for n, d in deltas.items()}
        for name, direction in self.kfac.precondition(gradients).items():
            deltas[name].grad = direction
