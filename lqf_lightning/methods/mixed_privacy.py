"""Core weights that never have to forget, and a linear perturbation of them that can, all at once."""

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch

from lqf_lightning.backbones import Backbone
from lqf_lightning.methods.core_hash import core_hash
from lqf_lightning.methods.core_origin import CoreOrigin
from lqf_lightning.methods.lqf import LQF

_CORE = "linearized.model."  # where checkpoints keep the core


class MixedPrivacy(LQF):
    r"""Fits user weights ``w_u`` around frozen core weights ``w_c`` (Golatkar et al., CVPR 2021, eqs. 5, 7, 8).

    .. math:: f(x) = f_{w_c}(x) + J_{w_c}(x)\,w_u, \qquad
        \frac{1}{2n} \sum_i \lVert f(x_i) - \alpha e_{y_i} \rVert^2 + \frac{\mu}{2} \lVert w_u \rVert^2

    The core is trained beforehand, by any method of a plain network, on data that will never have to be forgotten:
    ``backbone.weights=CORE/checkpoints/last.ckpt``, or what was published. This run must not have seen by the core what
    it trains on; where the core's run folder tells, that is checked by content. Zeroing ``w_u`` forgets all of the
    training data at once, and a hash of the core proves that training it left nothing behind there. What a person has
    chosen while looking at user data (ridge, learning rate, normalization constants), and what was chosen on a
    validation set that holds some, is outside of this guarantee.

    Every parameter is penalized, so the loss is strongly convex with modulus mu; the bias of the head can be exempted.

    Args:
        backbone: The core network, its head and its layer groups.
        classes: Class names, in the order of the outputs.
        core_weights: The option ``backbone.weights``, to find what a run of ours trained the core on; None: unknown.
        target_scale: Value alpha of the right class; 1 in the paper.
        ridge: Strength mu of the penalty, positive, or "auto", which chooses by the user data.
        intercept: Whether the bias of the head is free of penalty, and the loss no longer strongly convex in it.
        **options: The others of `LQF`.

    Attributes:
        origin: Where the core comes from.
        core_hash: Fingerprint of the core (see `core_hash`).

    Raises:
        ValueError: `ridge` is 0, or an option is unknown.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        core_weights: str | None = None,
        target_scale: float = 1.0,
        ridge: float | Literal["auto"] = 5e-4,
        intercept: bool = False,
        **options: Any,
    ) -> None:
        _refuse(ridge, options)
        super().__init__(backbone, classes, target_scale=target_scale, ridge=ridge, intercept=intercept, **options)
        self.origin = CoreOrigin.find(backbone.weights, core_weights)
        self.core_hash = core_hash(self.linearized.model.state_dict())
        self.hparams["core"] = {"hash": self.core_hash, **self.origin.as_dict()}

    def setup(self, stage: str) -> None:
        """Refuse to train on what the core has seen.

        Args:
            stage: "fit", or another.
        """
        super().setup(stage)
        manifest = getattr(cast(Any, self.trainer).datamodule, "manifest", None)
        if stage == "fit" and manifest is not None:
            self.origin.refuse_overlap(manifest)

    def verify_core(self) -> None:
        """Check that the core is what it was before training, and raise a RuntimeError if it is not."""
        _refuse_changed(core_hash(self.linearized.model.state_dict()), self.core_hash, "the core in memory")

    def forget_everything(self) -> None:
        """Zero the user weights: the outputs are bitwise those of the linearized core, which has seen no user data.

        What else was derived from the data is not touched: checkpoints, kernels and tables of the run, and the state of
        optimizer and solver of a fit that is going on.
        """
        self.verify_core()
        with torch.no_grad():
            for delta in self.linearized.deltas.values():
                delta.zero_()

    def on_fit_start(self) -> None:
        """Prepare the solver, around the core of the construction or of the checkpoint."""
        self.verify_core()
        super().on_fit_start()

    def on_train_end(self) -> None:
        """Say how far it is to the optimum, and that the core was left alone."""
        super().on_train_end()
        self.verify_core()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the fingerprint of the core and where it comes from."""
        super().on_save_checkpoint(checkpoint)
        self.verify_core()
        checkpoint["core"] = {"hash": self.core_hash, **self.origin.as_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the core of a checkpoint, if it is the one that its run began with.

        Args:
            checkpoint: What the file holds.

        Raises:
            ValueError: It is no checkpoint of this method.
        """
        super().on_load_checkpoint(checkpoint)
        known = checkpoint.get("core")
        if not isinstance(known, Mapping):
            raise ValueError(
                "the checkpoint has no fingerprint of its core, so method=mixed_privacy did not write it. Give a "
                "checkpoint of such a run, or set method=lqf"
            )
        state = checkpoint["state_dict"]
        stored = {name.removeprefix(_CORE): value for name, value in state.items() if name.startswith(_CORE)}
        _refuse_changed(core_hash(stored), known["hash"], "the core in the checkpoint")
        self.core_hash = known["hash"]
        self.origin = CoreOrigin(**{name: value for name, value in known.items() if name != "hash"})
        self.hparams["core"] = dict(known)


def _refuse_changed(found: str, expected: str, which: str) -> None:
    if found != expected:
        raise RuntimeError(
            f"{which} has the hash {found[:16]}..., expected {expected[:16]}...: it was changed after the run began, "
            "so that forgetting the user weights would not bring the core back. Train them again, and leave the "
            "parameters and buffers of `linearized.model` alone"
        )


def _refuse(ridge: float | str, options: Mapping[str, Any]) -> None:
    if options.get("relinearize"):
        raise ValueError("the core stays as it is in mixed privacy, got relinearize. Set method.relinearize=0")
    if not isinstance(ridge, str) and not 0 < ridge < math.inf:
        raise ValueError(
            f"mixed privacy needs a strongly convex loss, so a positive `ridge`, got {ridge}. Set method.ridge=5e-4"
        )
    known = [name for name in inspect.signature(LQF).parameters if name not in ("backbone", "classes")]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "core_weights"], n=1)
            hint = f"Did you mean `method.{near[0]}`? " if near else ""
            raise ValueError(f"`method.{name}` is no option of MixedPrivacy. {hint}Its options: {known}")
