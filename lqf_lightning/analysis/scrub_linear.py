"""The exact scrub of a linear model: its optimum on the training samples that are left, with a certificate."""

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lqf_lightning.analysis.counted_passes import CountedPasses
from lqf_lightning.analysis.intercept_certificate import mean_jacobian_by_pulls
from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.analysis.kernel_scrub import LIMIT, KernelScrub, kernel_of_present_samples
from lqf_lightning.analysis.newton_scrub import NewtonScrub, fit_inverse
from lqf_lightning.analysis.scrubbed import Scrubbed
from lqf_lightning.analysis.stopping_rule import StoppingRule
from lqf_lightning.analysis.verify_linear import intercept_gap, penalized_part, refuse_linear
from lqf_lightning.linear import ConjugateGradient
from lqf_lightning.methods import LQF

log = logging.getLogger(__name__)
SolverChoice = Literal["auto", "newton", "kernel"]
ASSEMBLED = 4_000  # rows up to which "auto" assembles a kernel: one that was not kept costs a pass per five outputs


def scrub_linear(
    method: LQF,
    *,
    solver: SolverChoice = "auto",
    tolerance: float | None = None,
    distance: float | None = None,
    max_steps: int = 100,
    memory_gib: float = 4.0,
    kernel: KeptKernel | None = None,
    from_zero: bool = False,
    certify_intercept: bool = False,
) -> Scrubbed:
    r"""Find the weights that training on the samples left would have found, from the present weights.

    The data module must be without the samples to forget already, the method at its trained weights, which are not
    written. What "retrained" means: the optimum of the method's own objective on the n_r samples that are left, the
    ridge of the sum form :math:`n_r \mu`, the intercept at its optimum. A Newton step leads there from any weights.
    All ranks call this together.

    Args:
        method: The method, attached to a trainer with its data module.
        solver: "newton" (conjugate gradients, any size), "kernel" (a factorization; up to 20,000 samples times
            outputs), or "auto": the kernel where one was kept, or where there are up to 4,000 rows.
        tolerance: Relative gradient to reach; None: the method's, unless there is a `distance`.
        distance: Bound of `|dw - dw*|` to reach, in the norm of the metric; with `tolerance`, both must hold. Alone, it
            spares the gradient at the pre-trained weights, and the relative gradient is not a number.
        max_steps: Most steps of conjugate gradients.
        memory_gib: Memory for what a kernel is assembled from, in GiB.
        kernel: Kernel of the training samples, those to forget included or not; None: there is none.
        from_zero: Start at the pre-trained weights: the cold retraining by the same solver.
        certify_intercept: Whether to spend a pass with as many right-hand sides as outputs on the bound of the
            intercept, which a kernel gives for nothing.

    Returns:
        The weights and their certificate, from a gradient that was computed once more, from the weights as stored.

    Raises:
        ValueError: An option is unknown, or the method has no optimum that can be certified (`refuse_linear`).
    """
    began = time.perf_counter()
    refuse_linear(method)
    if solver not in ("auto", "newton", "kernel"):
        raise ValueError(f"`solver` must be auto, newton or kernel, got {solver!r}. Set solver=auto")
    if method.hparams["ridge"] == "auto":
        learned = " with its factors by layer group" if method.hparams["metric"] == "learned" else ""
        log.info(
            "ridge=%.4g%s is kept: it was chosen when the samples to forget still had a say", method.ridge, learned
        )
    rule = StoppingRule(method.tolerance if tolerance is distance is None else tolerance, distance)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        chosen = by_kernel(method, solver, kernel)
        source = f"one to assemble (up to {ASSEMBLED} rows by itself)" if kernel is None else "the one that was kept"
        log.info("scrub by %s: solver=%s", f"a kernel, {source}" if chosen else "conjugate gradients", solver)
        if chosen:
            found = _by_factorization(method, rule, max_steps, kernel, memory_gib)
        else:
            found = _by_steps(method, rule, max_steps, from_zero)
        if certify_intercept and method.intercept_name is not None and found.mean_jacobian is None:
            passes = found.passes
            found.mean_jacobian = mean_jacobian_by_pulls(passes.problem, passes.metric, passes.pull)
        return found.scrubbed(rule, time.perf_counter() - began)


@dataclass
class _Found:
    # Where a solver has ended, and what it has spent; `mean_jacobian` is None if it has not been computed.
    name: str
    passes: CountedPasses
    point: ConjugateGradient
    steps: int
    curve: list[dict[str, float]]
    mean_jacobian: float | None = None

    def scrubbed(self, rule: StoppingRule, seconds: float) -> Scrubbed:
        method, certificate = self.passes.method, self.point.certificate
        wanted = dict(self.point.movement)
        if method.intercept_name is not None:
            wanted[method.intercept_name] = self.point.intercept
        weights = {name: wanted[name].to(delta).detach().clone() for name, delta in method.trained().items()}
        bound = None if self.mean_jacobian is None else self.mean_jacobian * certificate.distance_bound
        if method.intercept_name is None:
            bound = 0.0
        elif bound is not None:  # and what its own storage rounds
            bound += intercept_gap(method, weights, self.point.intercept)
        if rule.tolerance is None:
            certificate = replace(certificate, relative_gradient=math.nan)
        return Scrubbed(weights, certificate, bound, self.name, self.steps, self.passes.count, seconds, self.curve)


def by_kernel(method: LQF, solver: SolverChoice, kernel: KeptKernel | None) -> bool:
    """Say whether `scrub_linear` would take a kernel.

    Args:
        method: The method, its data module without the samples to forget.
        solver: See `scrub_linear`.
        kernel: Kernel of the training samples; None: there is none.

    Returns:
        Whether it would.
    """
    if solver != "auto":
        return solver == "kernel"
    samples, outputs = len(method.solver.data_module().fixed_train_dataloader().dataset), len(method.classes)
    return samples * outputs <= (ASSEMBLED if kernel is None else LIMIT)


def _by_steps(method: LQF, rule: StoppingRule, most: int, from_zero: bool) -> _Found:
    present = {name: delta.detach() for name, delta in method.trained().items()}
    movement = penalized_part(method, {n: torch.zeros_like(d) for n, d in present.items()} if from_zero else present)
    passes = CountedPasses(method, movement)
    inverse = fit_inverse(method, passes)
    reference = math.nan if rule.tolerance is None else None
    work = NewtonScrub(passes, rule, most)
    point = work.run(passes.measure(movement, passes.image, reference=reference, precondition=inverse))
    return _Found("newton", passes, point, work.steps, work.curve)


def _by_factorization(
    method: LQF, rule: StoppingRule, most: int, kernel: KeptKernel | None, memory_gib: float
) -> _Found:
    passes = CountedPasses(method, {})
    kept = kernel_of_present_samples(passes, memory_gib) if kernel is None else kernel
    work = KernelScrub(passes, kept, rule)
    point = work.run()
    found = _Found("kernel", passes, point, work.steps, work.curve, work.mean_jacobian)
    if rule.gap(point.certificate) <= 1 or most <= work.steps:
        return found
    if method.trainer.is_global_zero:
        log.warning(
            "the kernel brings dw within %.3g of the optimum, and conjugate gradients go on from there: its rounding "
            "matters at this ridge, or it is that of another model", point.certificate.distance_bound,
        )  # fmt: skip
    inverse, further = fit_inverse(method, passes), NewtonScrub(passes, rule, most - work.steps)
    point = further.run(passes.measure(point.movement, point.image, reference=point.reference, precondition=inverse))
    return replace(found, point=point, steps=work.steps + further.steps, curve=work.curve + further.curve)
