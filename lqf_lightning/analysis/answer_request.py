"""A request to forget training samples, answered: new weights, and everything that a report on them says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.analysis.affordable_shadows import affordable_shadows
from lqf_lightning.analysis.answers_of_model import Answers, Questions
from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.analysis.query_curve import query_curve
from lqf_lightning.analysis.read_outs import PARTS, read_outs
from lqf_lightning.analysis.relearn import Relearning, RelearnOptions
from lqf_lightning.analysis.release_noise import noise_kind, release_noise
from lqf_lightning.analysis.scrub_linear import ASSEMBLED, by_kernel, scrub_linear
from lqf_lightning.analysis.scrub_network import scrub_network
from lqf_lightning.analysis.scrub_options import LINEAR, ScrubOptions
from lqf_lightning.analysis.scrub_words import bound_section, model_section, scrub_section
from lqf_lightning.analysis.scrubbed import Scrubbed
from lqf_lightning.analysis.secret_seed import secret_seed
from lqf_lightning.analysis.shadow_models import ShadowModels
from lqf_lightning.analysis.trained_elsewhere import weights_of_checkpoint
from lqf_lightning.analysis.verify_linear import VerifiedWeights, verify_linear
from lqf_lightning.analysis.with_buffers import with_buffers
from lqf_lightning.analysis.with_weights import trained_weights, with_weights
from lqf_lightning.backbones import Backbone
from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.forgetting.noise import Noise
from lqf_lightning.linear import Certificate
from lqf_lightning.methods import LQF, Method, MixedPrivacy

Tensors = dict[str, Tensor]
_SHARE = 0.01  # of the gradient that the samples leave
_ROUNDING, _REFINEMENTS = 2e-6, 4  # relative gradient of single precision; solutions by a kernel, which are cheap


@dataclass(frozen=True)
class Answered:
    """What a request has led to, the same on every rank.

    Attributes:
        released: The new weights, noise included, by `method.trained()` name.
        buffers: New batch-norm statistics by the names of the network; None: as before.
        scrubbed: The weights before noise, and what is known of them. Not to be released.
        kernel: Kernel of the retained samples, if there was one.
        report: The sections "model", "scrub", "bound" and "read_outs" of the report, plain values.
    """

    released: Tensors
    buffers: Tensors | None
    scrubbed: Scrubbed
    kernel: KeptKernel | None
    report: dict[str, Any]


class AnswerRequest:
    """Answers one request for a method at its trained weights; the data module is left without the cohort.

    Args:
        method: The method, attached to a trainer; it keeps its weights.
        data: Its data module, which still has the cohort.
        cohort: The samples.
        options: See there.
        start: The network before training, where "ntk" linearizes.
        kernel: Kernel of the training samples, if one was kept.
    """

    def __init__(
        self,
        method: Method,
        data: ImageDataModule,
        cohort: Cohort,
        options: ScrubOptions,
        *,
        start: Backbone | None = None,
        kernel: KeptKernel | None = None,
    ) -> None:
        self.method, self.data, self.cohort = method, data, cohort
        self.options = options = replace(options, noise=noise_kind(method, options.noise))
        self.start, self.kernel, self.linear = start, kernel, isinstance(method, LQF)
        options.refuse_other_model(self.linear, type(method).__name__)
        table = data.manifest.table
        there = ~torch.from_numpy(table["removed"].to_numpy(copy=True))
        self.present = cohort.indices[there[cohort.indices]]  # the files of the others are gone already
        self.answers: dict[str, Answers] = {}
        self.models: dict[str, Tensors] = {"original": trained_weights(method)}
        self.shadows: ShadowModels | str = "none were asked for"
        self.relearning: Relearning | None = None
        self.questions: Questions | None = None
        self.settled = False  # whether the tolerance was chosen here

    def run(self) -> Answered:
        """Do it; all ranks have to call this together.

        Returns:
            The new weights and the report.
        """
        left = self.data.manifest.rows("train")["index"]  # already without the cohort where its files are gone
        if left.isin(self.cohort.indices.tolist()).all():
            return self._forget_everything()
        with torch.inference_mode(False), torch.enable_grad():  # models learn again; an evaluation takes gradients away
            self._prepare()
            before, scrubbed = self._scrub()
            noise = release_noise(self.method, self.options.noise, self.options.sigma)
            released = self._release(scrubbed.weights, noise)
            verified = verify_linear(self.method, scrubbed.weights) if isinstance(self.method, LQF) else None
            self.models["scrubbed"] = released
            self._ask("scrubbed", scrubbed.buffers)
            self._retrained()
            report = {
                "model": model_section(self.method),
                "scrub": scrub_section(self.method, scrubbed, self.options, self.models["original"], before, verified),
                "bound": bound_section(self.method, scrubbed, noise, *self._against_retrained(scrubbed, noise)),
                "read_outs": self._read_outs(),
            }
        kernel = None if self.kernel is None else self.kernel.without(self.cohort.indices)
        return Answered(released, scrubbed.buffers, scrubbed, kernel, report)

    def _forget_everything(self) -> Answered:
        # No sample of the run is left: neither an optimum nor read-outs, and weights that never saw one.
        if not isinstance(self.method, MixedPrivacy):
            raise ValueError("only method=mixed_privacy can forget all of its training samples. Set cohort to fewer")
        weights = {name: torch.zeros_like(weight) for name, weight in self.models["original"].items()}
        found = Scrubbed(weights, Certificate(0.0, 0.0, 0.0), 0.0, "zero", 0, 0.0, 0.0)
        options = replace(self.options, noise="none", tolerance=None)
        self.data.forget(self.cohort.indices)
        report = {
            "model": model_section(self.method),
            "scrub": scrub_section(self.method, found, options, self.models["original"], None, found.certificate),
            "bound": bound_section(self.method, found, None),
            "read_outs": None,
        }
        return Answered(weights, None, found, None, report)

    def _prepare(self) -> None:
        # Everything that needs the cohort's images, while they are there.
        if not len(self.present):
            return
        validation = bool(len(self.data.val_dataloader()))
        asked = (self.options.shadows, self.options.memory_gib)
        self.shadows, kernel = affordable_shadows(self.method, self.data, self.present, *asked)
        self.kernel = kernel if self.kernel is None else self.kernel
        wanted = validation and isinstance(self.shadows, ShadowModels)
        self.questions = Questions(self.data, self.present, validation=wanted)
        self._ask("original")
        if self.options.relearn:
            retained = self.answers["original"].retain.index
            self.relearning = Relearning(self.method, self.data, self.present, retained, RelearnOptions(tolerance=0.5))

    def _scrub(self) -> tuple[VerifiedWeights | None, Scrubbed]:
        options, method = self.options, self.method
        if isinstance(method, LQF):
            self.data.forget(self.cohort.indices)
            before = verify_linear(method, self.models["original"])
            self._settle_tolerance(method, before)
            solver: Any = options.name if options.name in LINEAR else "auto"
            return before, self._solve(method, solver, kernel=self.kernel)
        name = "ntk" if options.name == "auto" else options.name
        if self.start is None:
            raise ValueError(
                "the network before training is not known: this run was resumed. Scrub the finished run with lqf-forget"
            )
        network: Any = method  # scrub_network refuses what it cannot scrub
        found = scrub_network(network, self.start, self.present, name=name, **options.options)
        self.data.forget(self.cohort.indices)
        return None, found

    def _settle_tolerance(self, method: LQF, before: Certificate) -> None:
        # That of the method may be above what the samples leave: then nothing would be done, and nothing proven.
        if self.options.tolerance is self.options.distance is None:
            wanted = min(method.tolerance, _SHARE * before.relative_gradient)
            self.options, self.settled = replace(self.options, tolerance=max(wanted, _ROUNDING)), True

    def _solve(self, method: LQF, solver: Any, **changes: Any) -> Scrubbed:
        options, tolerance, most = self.options, self.options.tolerance, self.options.max_steps
        if self.settled and by_kernel(method, solver, changes.get("kernel")):
            tolerance, most = _ROUNDING, min(most, _REFINEMENTS)
        return scrub_linear(
            method,
            solver=solver,
            tolerance=tolerance,
            distance=options.distance,
            max_steps=most,
            memory_gib=options.memory_gib,
            certify_intercept=True,
            **changes,
        )

    def _release(self, weights: Tensors, noise: Noise | None) -> Tensors:
        if noise is None:
            return dict(weights)
        added = noise.draw(weights, secret_seed(self.options.noise_seed, self.method.device))
        return {name: weight + added[name].to(weight) for name, weight in weights.items()}

    def _retrained(self) -> None:
        options, method = self.options, self.method
        if options.retrained is not None:
            self.models["retrained"] = weights_of_checkpoint(method, Path(options.retrained))
        elif isinstance(method, LQF):
            samples = len(self.data.manifest.rows("train"))
            small = samples * len(method.classes) <= ASSEMBLED
            if options.retrain is True or (options.retrain == "auto" and small):
                solver = "kernel" if small else "newton"  # a kernel of its own, not the one that was kept
                self.models["retrained"] = self._solve(method, solver, from_zero=True).weights
        elif options.retrain is True:
            raise ValueError(
                "only linear models are retrained here. Train without the samples (lqf-train with data.manifest of a "
                "trial with purge=false), and set callbacks.scrub.retrain=auto callbacks.scrub.retrained=CHECKPOINT"
            )
        if "retrained" in self.models:
            self._ask("retrained")

    def _ask(self, name: str, buffers: Mapping[str, Tensor] | None = None) -> None:
        if self.questions is not None:
            with with_weights(self.method, self.models[name]), with_buffers(self.method.backbone.model, buffers):
                self.answers[name] = self.questions.ask(self.method)

    def _against_retrained(
        self, scrubbed: Scrubbed, noise: Noise | None
    ) -> tuple[float | None, list[dict[str, float]]]:
        # What weights, and answers to queries, tell of the difference to the retrained model.
        retrained = self.models.get("retrained")
        if retrained is None or noise is None or not isinstance(self.method, LQF):
            return None, []
        change = {name: weight - retrained[name] for name, weight in scrubbed.weights.items()}
        asked = self.options.queries if self.options.noise == "isotropic" else 0
        curve = query_curve(self.method, self.data, change, asked, self.options.sigma) if asked else []
        return noise.information(change), curve

    def _read_outs(self) -> dict[str, Any] | None:
        if not self.answers:
            return None
        steps = None
        if self.relearning is not None:
            steps = {name: self.relearning.steps(weights) for name, weights in self.models.items()}
        asked = self.answers["original"]
        counts = {part: len(getattr(asked, part).label) for part in PARTS}
        return {"counts": counts} | read_outs(
            self.answers,
            self.method.loss,
            relearn_steps=steps,
            relearn=None if self.relearning is None else self.relearning.describe(),
            shadows=self.shadows,
        )
