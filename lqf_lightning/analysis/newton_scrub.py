"""Conjugate gradients from any weights to the optimum on the training samples that are there."""

import logging

from lqf_lightning.analysis.counted_passes import CountedPasses, Tensors
from lqf_lightning.analysis.stopping_rule import StoppingRule, next_is_enough, stands_still
from lqf_lightning.linear import Certificate, ConjugateGradient
from lqf_lightning.linear.conjugate_gradient import Precondition
from lqf_lightning.linear.least_gradient import LeastGradient
from lqf_lightning.methods import LQF
from lqf_lightning.methods.solvers.curvature_samples import fit_preconditioner

log = logging.getLogger(__name__)
_DAMPING = 10.0  # times the ridge: of Kronecker factors, what leaves the fewest steps to the first digits


class NewtonScrub:
    r"""Solves the Newton step :math:`H_r v = g_r(dw)`, which leads to the optimum from any dw, optimal or not.

    (Golatkar et al., Mixed-Privacy Forgetting, CVPR 2021, eqs. 9-13, with gradient and Hessian in one normalization.)
    A step is a pass forward and one back. Of all points so far the combination of least gradient is kept
    (`LeastGradient`), whose bound never rises from step to step, and the descent ends as soon as it is good enough. Its
    outputs are then computed anew, from the weights as they are stored, so that the gradient that follows is at once
    its certificate. Where the next point itself is expected to be good enough this is done in the step, which spares a
    pass back.

    Args:
        passes: The samples that are there.
        rule: When to stop.
        most: Most steps.

    Attributes:
        gaps: What `rule` says of the points of the descent.
        curve: Work, relative gradient and distance by then of the combination, at the start and after every step; the
            last one is that of the weights that come back, measured from scratch.
        steps: Steps taken.
    """

    def __init__(self, passes: CountedPasses, rule: StoppingRule, most: int) -> None:
        self.passes, self.rule, self.most = passes, rule, most
        self.gaps: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.steps = 0

    def run(self, descent: ConjugateGradient) -> ConjugateGradient:
        """Descend.

        Args:
            descent: The start, its gradient measured from scratch.

        Returns:
            The combination, or the last point, in place of the descent; its gradient is measured from scratch.
        """
        exact, always = True, False  # whether the point is, and all have to be, measured from scratch
        least = self._begin(descent)
        while not (exact and self.gaps[-1] <= 1):
            near = self.rule.gap(least.certificate) <= 1  # so it seems by images that have been added up
            ends = self.steps >= self.most or stands_still(self.gaps)
            if near or ends:
                if self.steps or not exact:
                    self._move(descent, least.movement)
                if ends or self.rule.gap(descent.certificate) <= 1:
                    self._tell(descent)
                    break
                always, least = True, self._begin(descent)
            descent.receive_image(self.passes.push(descent.direction, "step"))
            self.steps += 1
            exact = always or next_is_enough(self.gaps)
            if exact:
                descent.renew_image(self.passes.push(descent.movement, "outputs of the new weights"))
            descent.receive_gradient(self.passes.pull(descent.residual)[0])
            least.update()
            self.gaps.append(self.rule.gap(descent.certificate))
            self._note(least.certificate)
        self.curve.pop()
        self._note(descent.certificate)
        return descent

    def _begin(self, descent: ConjugateGradient) -> LeastGradient:
        # Also after a combination that has turned out worse than its sums said, which is noted in their place.
        if self.gaps:
            self.curve.pop()
        self.gaps = [*self.gaps, self.rule.gap(descent.certificate)]
        self._note(descent.certificate)
        return LeastGradient(descent)

    def _move(self, descent: ConjugateGradient, movement: Tensors) -> None:
        descent.movement, descent.direction = movement, {}  # what follows begins with the steepest descent
        descent.renew_image(self.passes.push(movement, "outputs of the new weights"))
        descent.receive_gradient(self.passes.pull(descent.residual)[0])

    def _note(self, certificate: Certificate) -> None:
        row = {"passes": self.passes.count, "distance_bound": certificate.distance_bound}
        if self.rule.tolerance is not None:
            row["relative_gradient"] = certificate.relative_gradient
        self.curve.append(row)

    def _tell(self, descent: ConjugateGradient) -> None:
        found = descent.certificate
        if self.passes.method.trainer.is_global_zero and self.rule.gap(found) > 1:
            why = "rounding allows no better" if stands_still(self.gaps) else f"after max_steps={self.most}"
            log.warning(
                "the scrub stopped before it was near enough, %s: dw is within %.3g of the optimum. Set a higher "
                "tolerance, max_steps or method.ridge, or trainer.precision=64-true", why, found.distance_bound,
            )  # fmt: skip


def fit_inverse(method: LQF, passes: CountedPasses) -> Precondition | None:
    """Fit the Kronecker factors that the method is preconditioned with, on the samples that are there.

    A sketch of the Jacobian, which the method may train with, acts on coefficients of samples: a start at weights that
    forgotten samples took part in has none. Its place is taken by the factors.

    Args:
        method: The method.
        passes: Count the work.

    Returns:
        An approximate inverse of the Hessian; None if the method has no preconditioner, or does not want it.
    """
    if method.preconditioner is None or method.acceleration == "none":
        return None
    kfac = fit_preconditioner(method, intercept=method.intercept_name)
    if kfac is None:
        return None
    samples = passes.problem.samples
    share = min(method.preconditioner_samples or samples, samples) / samples
    random = getattr(method.preconditioner, "keywords", {}).get("cotangents", "exact") == "random"
    passes.units += share * (1 + (1 if random else passes.problem.outputs))
    return passes.metric.curvature_solver(kfac, samples, passes.problem.ridge, _DAMPING)
