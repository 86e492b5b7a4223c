"""Linear quadratic fine-tuning: a network's first-order expansion, trained by a squared loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lqf_lightning.backbones import Backbone
from lqf_lightning.congruence.tradeoff import TradeoffCurve
from lqf_lightning.data import Batch
from lqf_lightning.linear import KFAC, RegularizationPath
from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.linear.learned_penalty import LearnedPenalty
from lqf_lightning.methods.logit_matching import LogitMatching
from lqf_lightning.methods.losses import LossName, choose_loss
from lqf_lightning.methods.lqf_refusals import refuse_options
from lqf_lightning.methods.matching_refusals import refuse_matching_options
from lqf_lightning.methods.method import OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.same_reference import refuse_other_reference
from lqf_lightning.methods.solved_method import SolvedMethod
from lqf_lightning.methods.solvers import Acceleration, Outlook, SolverName, make_solver
from lqf_lightning.teachers import Reference

Preconditioner = Callable[..., KFAC]


class LQF(SolvedMethod):
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
        ridge: Strength mu of the penalty, in the mean form above, or "auto": chosen by leave-one-out, exactly with
            ``kernel``, else by the surrogate of a trace kernel. It enters the gradient before the preconditioner.
        group_ridge: Factor of the ridge per layer group, 1 where absent: the metric M.
        metric: "identity" (times `group_ridge`), "learned" (a factor for every layer group, found with the ridge by
            the leave-one-out cross-entropy; with ``ridge=auto``), or "kfac": the damped curvature of the
            preconditioner, for ``cg``.
        penalty_by: With ``metric=learned`` a factor for every "stage" (layer group) or every residual "block".
        intercept: Whether the bias of the head is free of penalty.
        layers: Names of the layer groups that are linearized; None means all, ``[head]`` is a linear probe.
        group_lr: Learning-rate factor per layer group, 1 where absent. For ``sgd``.
        solver: "sgd" (augmentation, very large sets), "cg" (conjugate gradients to the certified optimum on fixed
            images, one epoch per iteration), "kernel" (exact, for up to 20,000 samples times classes), or "auto":
            ``kernel`` up to 2,000 samples times classes, else ``cg``.
        tolerance: Relative norm of the gradient at which ``cg`` stops.
        preconditioner: Fits Kronecker factors of the Gauss-Newton matrix once, before the first step; None trains on
            the plain gradient. For ``sgd`` and ``cg``.
        preconditioner_samples: Training samples that the factors are computed from; None means all.
        acceleration: What preconditions ``cg``: "trace" (the trace kernel, whatever the number of classes), "sketch"
            (of the Jacobian; up to 20,000 samples times classes), "kfac" (the `preconditioner`), "none", or "auto":
            a sketch up to 8,000, else the preconditioner; with ``metric=learned`` up to 13,000 the trace kernel, or a
            sketch where the ridge is small, else the preconditioner.
        penalty_samples: Most training samples that a surrogate kernel is assembled from to choose a penalty.
        relinearize: How often the network is expanded anew around the optimum, a part of the way to it, and solved
            again with the same penalty: nonlinear steps, of which the last is exact. What rests on leave-one-out or
            forgets does not hold then: the weights that are expanded around have seen the labels. Not for ``sgd``.
        normalize_step: Divide directions by the largest curvature that some training batches have after
            preconditioning: on these, learning rates below 2 are stable (below 3.8 with momentum 0.9). Others can be
            steeper, small ones above all. Sample weights and a reference make samples heavier: also by the largest
            weight, of `data.weights` or 1 + alpha + beta. Adaptive optimizers do not notice it. For ``sgd``.
        memory_gib: Memory for what a kernel is assembled from, in GiB; less takes more passes.
        kernel_folder: Folder that keeps finished parts of the kernel, so that an interrupted assembly goes on.
        reference: A model in use today, to be matched (see `LogitMatching`); for training, not part of checkpoints.
        alpha: How much every sample is held to the reference, in units of the loss to the labels.
        beta: How much more it is where the reference is right.
        reference_scale: What the reference's outputs are multiplied with, or "auto": fitted to the targets. For a
            reference that has learned the same targets, 1.
        tradeoff: Values of `alpha` and of `beta` whose combinations are compared on the validation set. For ``kernel``.

    Attributes:
        path: What every ridge would give, where ``ridge="auto"`` has compared them in this run, else None.
        path_form: Form of the kernel behind it: "full" is exact, "trace" a surrogate.
        learned_penalty: What was learned, where ``metric="learned"`` has done so in this run, else None.
        penalty_form: Form of the kernel behind it.
        relative_ridge: The ridge that was learned, in terms of the mean diagonal of the weighted kernel.
        expansions: How often the network has been expanded anew.
        outlook: What leave-one-out says about probe, LQF and nonlinear methods, with `learned_penalty`.
        matching: The reference, if there is one.
        tradeoff_curve: What `tradeoff` has compared in this run, else None.
    """

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
        metric: Literal["identity", "learned", "kfac"] = "identity",
        intercept: bool = True,
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
        solver: SolverName = "sgd",
        tolerance: float = 1e-3,
        preconditioner: Preconditioner | None = None,
        preconditioner_samples: int | None = None,
        acceleration: Acceleration = "auto",
        penalty_by: Literal["stage", "block"] = "stage",
        penalty_samples: int = 2000,
        relinearize: int = 0,
        normalize_step: bool = True,
        memory_gib: float = 4.0,
        kernel_folder: str | None = None,
        reference: Reference | None = None,
        alpha: float = 1.0,
        beta: float = 5.0,
        reference_scale: float | Literal["auto"] = "auto",
        tradeoff: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__(backbone, classes, optimizer=optimizer, scheduler=scheduler, layers=layers, group_lr=group_lr)
        ignored = ["backbone", "optimizer", "scheduler", "preconditioner", "reference"]
        self.save_hyperparameters(ignore=ignored, logger=False)
        refuse_options(self.hparams, preconditioner)
        refuse_matching_options(self.hparams)
        self.ridge = math.nan if ridge == "auto" else float(ridge)
        self.path: RegularizationPath | None = None
        self.path_form: KernelForm | None = None
        self.learned_penalty: LearnedPenalty | None = None
        self.penalty_form: KernelForm | None = None
        self.outlook: Outlook | None = None
        self.squared, self.target_scale = loss == "squared", target_scale
        self._loss = choose_loss(loss, target_scale)
        self.preconditioner, self.preconditioner_samples = preconditioner, preconditioner_samples
        self.metric, self.tolerance, self.acceleration = metric, tolerance, acceleration
        self.penalty_samples, self.relinearize, self.expansions = penalty_samples, relinearize, 0
        self.normalize_step, self.memory_gib, self.kernel_folder = normalize_step, memory_gib, kernel_folder
        self.linearize(group_ridge, intercept, by_block=metric == "learned" and penalty_by == "block")
        self.tradeoff_curve: TradeoffCurve | None = None
        self.hparams["reference_fingerprint"] = None if reference is None else reference.fingerprint
        if reference is not None:
            self.matching = LogitMatching(
                self, reference, alpha=alpha, beta=beta, scale=reference_scale, tradeoff=tradeoff
            )
        self.weighs_samples = reference is None  # which has weights of its own
        self.use(make_solver(solver, self))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The chosen loss to the labels, which evaluation reports.

        Args:
            logits: Outputs (B, C).
            target: Class positions (B,).

        Returns:
            A scalar, averaged over the batch.
        """
        return self._loss(logits, target)

    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The data term of the objective: the loss to the labels, and what matching the reference adds.

        Args:
            logits: Outputs (B, C), B at least 1.
            batch: The samples that they belong to.

        Returns:
            A scalar, averaged over the batch.
        """
        weight = self.weights_of(batch.index)
        loss = self.loss(logits, batch.target) if weight is None else self._loss(logits, batch.target, weight=weight)
        return loss if self.matching is None else loss + self.matching.penalty(logits, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a chosen ridge, and what the solver needs to go on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint.update(self.settled_penalty(), expansions=self.expansions, solver=self.solver.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back a chosen ridge, and in a fit the state of the solver."""
        super().on_load_checkpoint(checkpoint)
        options = checkpoint.get("hyper_parameters", {})
        if self.hparams["ridge"] == options.get("ridge") == "auto" and self._same_metric(options):
            self.ridge = checkpoint["ridge"]
            if self.metric == "learned":
                self.group_ridge = dict(checkpoint["group_ridge"])
                self.relative_ridge = float(checkpoint["relative_ridge"])
                groups: Mapping[str, Sequence[str]] = checkpoint["penalty_groups"]
                self.penalty_groups = {group: tuple(names) for group, names in groups.items()}
        self.expansions = checkpoint.get("expansions", 0)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self.stored_solver = options.get("solver", "sgd")
            if self.stored_solver == self.hparams["solver"] == "sgd":  # the others look at the problem itself
                known = {"reference_fingerprint": None} | options  # older versions had no references
                refuse_other_reference(known, self.hparams, ("alpha", "beta", "reference_scale"))
            self.solver.restore(checkpoint.get("solver", {}))

    def _same_metric(self, options: Mapping[str, Any]) -> bool:
        # A ridge that was chosen for other factors, or factors of other groups, would say nothing here.
        usual = {"metric": "identity", "penalty_by": "stage"}  # of older versions
        return all(self.hparams[name] == options.get(name, value) for name, value in usual.items())
