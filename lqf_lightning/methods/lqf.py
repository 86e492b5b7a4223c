"""Linear quadratic fine-tuning: a network's first-order expansion, trained by a squared loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lqf_lightning.backbones import Backbone
from lqf_lightning.data import Batch
from lqf_lightning.linear import KFAC, LinearizedModel, RegularizationPath
from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.methods.intercept import is_intercept, tell_missing_intercept
from lqf_lightning.methods.known_groups import known_groups
from lqf_lightning.methods.losses import LossName, choose_loss
from lqf_lightning.methods.lqf_refusals import refuse_options, refuse_strategy, refuse_weight_decay
from lqf_lightning.methods.method import Method, OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.solvers import Acceleration, Solver, SolverName, make_solver

Preconditioner = Callable[..., KFAC]


class LQF(Method):
    r"""Fits ``f0(x) + J(x) dw`` to scaled one-hot targets (Achille et al., LQF, CVPR 2021).

    .. math:: \frac{1}{2n} \sum_i \lVert f_0(x_i) + J(x_i)\,dw - \alpha e_{y_i} \rVert^2
        + \frac{\mu}{2} dw^T M\,dw

    The expansion is taken at the pre-trained weights with batch-norm statistics frozen, so the problem is a convex
    quadratic in ``dw``. Predict with this model, never with the network at ``w0 + dw``: that is another function. The
    bias of the head is the intercept, free of penalty.

    Args:
        backbone: The network, its (random, non-zero) head and its layer groups.
        classes: Class names, in the order of the outputs.
        optimizer: Builds the optimizer from parameter groups; its own weight decay must be 0. For ``sgd``.
        scheduler: Builds a per-step schedule; None keeps the rate. For ``sgd``.
        loss: "squared", or "cross_entropy" (the paper's ablation; no longer quadratic, and ``sgd`` only).
        target_scale: Value alpha of the right class.
        ridge: Strength mu of the penalty, in the mean form above, or "auto": chosen by leave-one-out accuracy, exactly
            with ``kernel``, else by the surrogate of a trace kernel. It enters the gradient before the preconditioner.
        group_ridge: Factor of the ridge per layer group, 1 where absent: the metric M.
        metric: "identity" (times `group_ridge`), or "kfac": the damped curvature of the preconditioner, for ``cg``.
        intercept: Whether the bias of the head is free of penalty.
        layers: Names of the layer groups that are linearized; None means all, ``[head]`` is a linear probe.
        group_lr: Learning-rate factor per layer group, 1 where absent. For ``sgd``.
        solver: "sgd" (augmentation, very large sets), "cg" (conjugate gradients to the certified optimum on fixed
            images, one epoch per iteration), or "kernel" (exact, for up to 20,000 samples times classes).
        tolerance: Relative norm of the gradient at which ``cg`` stops.
        preconditioner: Fits Kronecker factors of the Gauss-Newton matrix once, before the first step; None trains on
            the plain gradient. For ``sgd`` and ``cg``.
        preconditioner_samples: Training samples that the factors are computed from; None means all.
        acceleration: What preconditions ``cg``: "sketch" (of the Jacobian; up to 20,000 samples times classes), "kfac"
            (the `preconditioner`), "none", or "auto": a sketch up to 8,000, else the preconditioner.
        normalize_step: Divide directions by the largest curvature that some training batches have after
            preconditioning: on these, learning rates below 2 are stable (below 3.8 with momentum 0.9). Others can be
            steeper, small ones above all. Adaptive optimizers do not notice it. For ``sgd``.
        memory_gib: Memory for what a kernel is assembled from, in GiB; less takes more passes.
        kernel_folder: Folder that keeps finished parts of the kernel, so that an interrupted assembly goes on.

    Attributes:
        path: What every ridge would give, where ``ridge="auto"`` has compared them in this run, else None.
        path_form: Form of the kernel behind it: "full" is exact, "trace" a surrogate.
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
        ridge: float | Literal["auto"] = 1e-3,
        group_ridge: Mapping[str, float] | None = None,
        metric: Literal["identity", "kfac"] = "identity",
        intercept: bool = True,
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
        solver: SolverName = "sgd",
        tolerance: float = 1e-3,
        preconditioner: Preconditioner | None = None,
        preconditioner_samples: int | None = None,
        acceleration: Acceleration = "auto",
        normalize_step: bool = True,
        memory_gib: float = 4.0,
        kernel_folder: str | None = None,
    ) -> None:
        super().__init__(backbone, classes, optimizer=optimizer, scheduler=scheduler, layers=layers, group_lr=group_lr)
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "preconditioner"], logger=False)
        refuse_options(self.hparams, preconditioner)
        self.group_ridge = dict(group_ridge or {})
        known_groups(backbone, list(self.group_ridge), "group_ridge")
        self.ridge = math.nan if ridge == "auto" else float(ridge)
        self.path: RegularizationPath | None = None
        self.path_form: KernelForm | None = None
        self.squared, self.target_scale = loss == "squared", target_scale
        self._loss = choose_loss(loss, target_scale)
        self.preconditioner, self.preconditioner_samples = preconditioner, preconditioner_samples
        self.metric, self.tolerance, self.acceleration = metric, tolerance, acceleration
        self.normalize_step, self.memory_gib, self.kernel_folder = normalize_step, memory_gib, kernel_folder
        side = backbone.image_size
        names = [name for group in self.layers for name in backbone.groups[group]]
        self.linearized = LinearizedModel(backbone.model, names, example=torch.randn(2, 3, side, side))
        bias = f"{backbone.head}.bias"
        self.intercept_name = bias if intercept and is_intercept(self.linearized, bias, side) else None
        tell_missing_intercept(intercept, self.intercept_name, bias)
        self.solver: Solver = make_solver(solver, self)
        self.sweeps, self.automatic_optimization = self.solver.sweeps, self.solver.sweeps == 0
        self._stored_solver: str | None = None  # that of the checkpoint which a fit goes on from

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
        """Half the ridge times the squared distance from the pre-trained weights, in the metric of the groups.

        Returns:
            A scalar.
        """
        weights = self.penalty_weights()
        norms = torch._foreach_norm([self.linearized.deltas[name] for name in weights])
        squares = torch.stack(list(norms)).square()
        return 0.5 * self.ridge * (squares * squares.new_tensor(list(weights.values()))).sum()

    def penalty_weights(self) -> dict[str, float]:
        """What the ridge is multiplied with, by parameter.

        Returns:
            Factor by parameter name, the intercept left out.
        """
        factors = {n: self.group_ridge.get(g, 1.0) for g in self.layers for n in self.backbone.groups[g]}
        return {name: factors[name] for name in self.linearized.deltas if name != self.intercept_name}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters dw, by the names of the weights they change.

        Returns:
            Name to parameter.
        """
        return self.linearized.deltas

    def configure_optimizers(self) -> Any:
        """One parameter group per linearized layer group; exact solvers bring their own steps.

        Returns:
            What Lightning expects.
        """
        if self.sweeps:
            return torch.optim.SGD(self.linearized.deltas.values(), lr=1.0)
        configured = super().configure_optimizers()
        refuse_weight_decay(configured["optimizer"] if isinstance(configured, dict) else configured)
        return configured

    def setup(self, stage: str) -> None:
        """Choose the training batches, and refuse what the solver cannot work with.

        Args:
            stage: "fit", or another.
        """
        super().setup(stage)
        if stage == "fit":
            refuse_strategy(self.trainer.strategy)
            self.solver.check()

    def on_fit_start(self) -> None:
        """Prepare the solver.

        Raises:
            ValueError: The checkpoint to go on from is that of another solver.
        """
        stored, self._stored_solver = self._stored_solver, None
        if stored not in (None, self.hparams["solver"]):
            raise ValueError(
                f"the checkpoint was written with solver={stored}, which cannot go on with "
                f"solver={self.hparams['solver']}. Set method.solver={stored}, or ckpt_path=null to start over"
            )
        self.solver.start()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:  # type: ignore[override]
        """One stochastic step, or one batch of a sweep.

        Args:
            batch: Samples of this rank.
            batch_idx: Number of the batch in the epoch.

        Returns:
            Loss and outputs; nothing in a sweep that does not know them yet.
        """
        if self.hparams["ridge"] == "auto":
            self.log("train/ridge", self.ridge, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        return self.solver.step(batch, batch_idx) if self.sweeps else super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the solver change the gradients.

        Args:
            optimizer: Unused.
        """
        self.solver.before_optimizer_step()

    def on_train_epoch_end(self) -> None:
        """Stop a run that diverges, or that has arrived."""
        super().on_train_epoch_end()
        self.solver.end_epoch()

    def on_train_end(self) -> None:
        """Say how far it is to the optimum, where that is known."""
        self.solver.finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a chosen ridge, and what the solver needs to go on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ridge"], checkpoint["solver"] = self.ridge, self.solver.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back a chosen ridge, and in a fit the state of the solver."""
        super().on_load_checkpoint(checkpoint)
        options = checkpoint.get("hyper_parameters", {})
        if self.hparams["ridge"] == options.get("ridge") == "auto":
            self.ridge = checkpoint["ridge"]
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._stored_solver = options.get("solver", "sgd")
            self.solver.restore(checkpoint.get("solver", {}))
