"""What a request to forget may choose."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lqf_lightning.analysis.release_noise import NoiseKind

_NAMES = ("auto", "newton", "kernel", "ntk", "fisher", "finetune", "gradient_ascent", "random_labels", "hide_class")
LINEAR = ("newton", "kernel")


@dataclass(frozen=True)
class ScrubOptions:
    """How a request is answered, and what it is compared with.

    Attributes:
        name: "newton" or "kernel" for `lqf`, another for `finetune`; "auto": the exact one that is cheaper, or "ntk".
        tolerance: Relative gradient to reach; None: a hundredth of what the samples leave when they go, at most that of
            the method, unless there is a `distance`.
        distance: Bound on the distance from the optimum to reach instead.
        max_steps: Most steps of conjugate gradients.
        noise: Of the released weights; "auto": isotropic for `lqf`, none for `finetune`.
        sigma: Its deviation, root mean square over the weights.
        noise_seed: Of its draw. None: from the randomness of the system, which nobody can draw again; a number lets
            anyone who knows it take the noise off, and is for experiments.
        retrain: Whether an `lqf` model is retrained from zero, to compare with: from a kernel of its own up to
            4,000 samples times outputs, else by conjugate gradients; "auto": in the first case only.
        retrained: Checkpoint of a retrained model to compare with instead.
        queries: Test images whose answers are searched for information, if there is a retrained model.
        relearn: Whether the models learn the samples again.
        shadows: Models of the likelihood-ratio attack, where there are up to 4,000 samples times outputs; 0: none.
        memory_gib: Memory for what a kernel is assembled from, in GiB.
        options: Of a scrub of `finetune`, those of `NetworkScrub`.

    Raises:
        ValueError: An option has no such value.
    """

    name: str = "auto"
    tolerance: float | None = None
    distance: float | None = None
    max_steps: int = 200
    noise: NoiseKind = "auto"
    sigma: float = 1e-3
    noise_seed: int | None = None
    retrain: bool | Literal["auto"] = "auto"
    retrained: str | None = None
    queries: int = 16
    relearn: bool = True
    shadows: int = 32
    memory_gib: float = 4.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._choice("name", self.name, _NAMES)
        self._choice("noise", self.noise, ("auto", "isotropic", "diagonal", "kfac", "none"))
        self._choice("retrain", self.retrain, (True, False, "auto"))
        for option, usual in (("sigma", 0.001), ("tolerance", 0.001), ("distance", 0.1), ("memory_gib", 4)):
            value = getattr(self, option)
            self._check(option, value, value is None or 0 < value < math.inf, "a positive number", usual)
        for option, least, usual in (("max_steps", 1, 200), ("queries", 0, 16)):
            value = getattr(self, option)
            self._check(option, value, value >= least, f"at least {least}", usual)
        allowed = self.shadows == 0 or (self.shadows >= 6 and self.shadows % 2 == 0)
        self._check("shadows", self.shadows, allowed, "0, or an even number of at least 6", 32)
        if self.retrained is not None and self.retrain is True:
            raise ValueError(
                f"got retrain=true and retrained={self.retrained}, expected one model to compare with. Set "
                "callbacks.scrub.retrain=false"
            )

    def refuse_other_model(self, linear: bool, method: str) -> None:
        """Check that the scrub is one for the method.

        Args:
            linear: Whether the method is linear in its weights.
            method: Its name.

        Raises:
            ValueError: It is not.
        """
        fits = ("auto", *LINEAR) if linear else tuple(name for name in _NAMES if name not in LINEAR)
        if self.name not in fits:
            raise ValueError(
                f"callbacks.scrub.name={self.name} is no scrub of {method}. Set callbacks.scrub.name to one of "
                f"{', '.join(fits)}"
            )
        if linear and self.options:
            raise ValueError(
                f"callbacks.scrub.options={dict(self.options)} are of scrubs of finetune, this is {method}. Set "
                "callbacks.scrub.options={}"
            )

    def _choice(self, option: str, value: object, known: tuple[object, ...]) -> None:
        self._check(option, value, value in known, f"one of {', '.join(map(str, known)).lower()}", known[0])

    def _check(self, option: str, value: object, holds: bool, expected: str, usual: object) -> None:
        if not holds:
            raise ValueError(f"got {option}={value}, expected {expected}. Set callbacks.scrub.{option}={usual}")
