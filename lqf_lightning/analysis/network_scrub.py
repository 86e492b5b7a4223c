"""Which scrub of a nonlinear network is wanted, and how."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

ScrubName = Literal["fisher", "ntk", "finetune", "gradient_ascent", "random_labels", "hide_class"]
Center = Literal["start", "zero"]
_POSITIVE = ("cap", "head_cap", "factor", "class_variance", "memory_gib", "learning_rate", "clip")
_NUMBERS = ("epochs", "max_steps", "batch_size", "draws")  # at least 1, where they are given
_USUAL = {"cap": "1e3", "head_cap": "1e2", "factor": "10", "class_variance": "1e-4", "memory_gib": "4"}
_USUAL |= {"learning_rate": "0.01", "clip": "1", "epochs": "10", "max_steps": "100", "batch_size": "null"}
_USUAL |= {"draws": "null", "strength": "1e-6", "ceiling": "null"}


@dataclass(frozen=True)
class NetworkScrub:
    """Options of `scrub_network`; each scrub reads those that its line names.

    Attributes:
        name: "fisher" (noise where the retained samples can bear it), "ntk" (the step that a linearized training would
            have taken), or a baseline: "finetune" (go on with the retained samples), "gradient_ascent" (climb on the
            forgotten ones), "random_labels" (learn wrong labels of these), "hide_class" (its output can never win).
        seed: Decides the order of samples and wrong labels.
        noise_seed: Decides the noise. None: drawn from the randomness of the system, which nobody can draw again; a
            number lets anyone who knows it take the noise off, and is for experiments.
        reestimate: Take the statistics of batch normalization anew from the retained samples; else they stay, and may
            still hold the forgotten ones.
        strength: Of the noise; None: 1e-6 for fisher, no noise for ntk (1e-9 in the papers' code).
        cap: Noise of any strength: most that a weight gets, see `fisher_variance`.
        head_cap: The same for the last layer.
        factor: Noise: what variances of the last layer and of vectors are multiplied with.
        by_filter: Noise: whether the weights of a filter share it.
        class_variance: Noise of the head's row of a class that is forgotten as a whole; its mean becomes 0.
        draws: Labels drawn per sample for the Fisher information; None: its expectation over all labels.
        ridge: ntk: penalty beside the mean loss; "auto": by leave-one-out; None: the run's weight decay, or "auto"
            where the run has none.
        center: ntk: where the penalty pulls, to the "start" of the run, as in the papers' code and nearer to a run that
            ends long before its decay has forgotten the pre-trained weights, or to "zero", as weight decay does in the
            limit.
        trapezium: ntk: lengthen the step, see `trapezium_scale`.
        memory_gib: ntk: memory for what the kernel is assembled from.
        epochs: finetune, random_labels: passes over the samples.
        learning_rate: finetune, random_labels, gradient_ascent: rate of the descent, or ascent.
        momentum: The same.
        batch_size: finetune, random_labels: samples per step of all processes; None: that of the run.
        max_steps: gradient_ascent: most steps, each with all forgotten samples.
        ceiling: gradient_ascent: loss on the forgotten samples at which it stops; None: that of a model that knows
            nothing but how many classes there are.
        clip: gradient_ascent: longest gradient.
        hidden_logit: hide_class: the output of the class, for every image.

    Raises:
        ValueError: An option has no such value.
    """

    name: ScrubName = "ntk"
    seed: int = 0
    noise_seed: int | None = None
    reestimate: bool = False
    strength: float | None = None
    cap: float = 1e3
    head_cap: float = 1e2
    factor: float = 10.0
    by_filter: bool = True
    class_variance: float = 1e-4
    draws: int | None = None
    ridge: float | Literal["auto"] | None = None
    center: Center = "start"
    trapezium: bool = False
    memory_gib: float = 4.0
    epochs: int = 10
    learning_rate: float = 0.01
    momentum: float = 0.9
    batch_size: int | None = None
    max_steps: int = 100
    ceiling: float | None = None
    clip: float = 1.0
    hidden_logit: float = -1e4

    def __post_init__(self) -> None:
        self._check("name", self.name in get_args(ScrubName), f"one of {', '.join(get_args(ScrubName))}", "ntk")
        self._check("center", self.center in get_args(Center), "start or zero", "start")
        for option in (*_POSITIVE, "strength", "ceiling"):
            value = getattr(self, option)
            self._check(option, value is None or 0 < value < math.inf, "a positive number", _USUAL[option])
        for option in _NUMBERS:
            value = getattr(self, option)
            allowed = value is None or (isinstance(value, int) and value >= 1)
            self._check(option, allowed, "a whole number of at least 1", _USUAL[option])
        self._check("momentum", 0 <= self.momentum < 1, "a number in [0, 1)", "0.9")
        self._check("hidden_logit", -6e4 < self.hidden_logit < 0, "between -6e4, for half precision, and 0", "-1e4")
        known = self.ridge is None or self.ridge == "auto"
        allowed = known or (not isinstance(self.ridge, str) and 0 < (self.ridge or 0) < math.inf)
        self._check("ridge", allowed, "a positive number, auto or null", "auto")

    def _check(self, option: str, allowed: bool, expected: str, usual: str) -> None:
        if not allowed:
            where = "callbacks.scrub.name" if option == "name" else f"++callbacks.scrub.options.{option}"
            raise ValueError(f"got {option}={getattr(self, option)}, expected {expected}. Set {where}={usual}")

    @property
    def noise(self) -> float:
        """Strength of the noise, 0 for none."""
        if self.strength is None:
            return 1e-6 if self.name == "fisher" else 0.0
        return self.strength if self.name in ("fisher", "ntk") else 0.0
