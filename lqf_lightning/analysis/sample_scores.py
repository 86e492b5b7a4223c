"""What every training sample of a run tells, from the run's linear-quadratic problem."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.analysis.run_problem import RunProblem
from lqf_lightning.information import (
    LabelSuspects,
    function_information,
    label_suspects,
    langevin_information,
    weight_information,
)
from lqf_lightning.linear import DualFactor, flow, leave_one_out, leave_one_out_flow
from lqf_lightning.linear.steady_state import steady_state_information

STEADY_STATE_LIMIT = 4000  # rows of a kernel whose Lyapunov equation is solved: N^3 at once, N^2 per sample
Watch = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class SampleScores:
    """Scores of all training samples, by ascending index; information in nats.

    Attributes:
        index: Manifest index (n,).
        prediction: Output that the model trained without a sample gives on it (n, C).
        residual: Target minus that output (n, C).
        weight_information: Unique information in the weights, for isotropic noise of deviation sigma (n,).
        function_information: Unique information in the outputs on the validation images, for noise of deviation sigma
            (n,); None without validation images.
        leverage: Degrees of freedom that the sample takes (n,); None at a finite time.
        langevin_information: The same as the first, for the noise of Langevin dynamics (n,); None at a finite time.
        steady_state_information: The same, for the stationary noise of SGD (n,); None at a finite time, for a
            surrogate, and for problems that are too large.
        memorization: 1 where only the model that has seen the sample is right on it, -1 where only the other is (n,).
        suspects: How much the others contradict the label.
        settings: What the scores depend on: `kernel`, `exact`, `twin`, `time`, `ridge`, `sigma`, `target_scale`, ...
    """

    index: Tensor
    prediction: Tensor
    residual: Tensor
    weight_information: Tensor
    function_information: Tensor | None
    leverage: Tensor | None
    langevin_information: Tensor | None
    steady_state_information: Tensor | None
    memorization: Tensor
    suspects: LabelSuspects
    settings: dict[str, Any]


def score_samples(
    run: RunProblem,
    *,
    time: float | None = None,
    sigma: float = 1.0,
    temperature: float = 1.0,
    learning_rate: float | None = None,
    batch_size: int = 32,
    watch: Watch = iter,
) -> SampleScores:
    r"""Remove every sample in turn, exactly for the kernel of the run, and say what that changes.

    Unique information is the Kullback-Leibler divergence between what training gives with and without the sample, the
    result being smoothed by Gaussian noise (Harutyunyan et al., 2021, arXiv 2101.06640, equations 5 and 8).

    Args:
        run: The problem.
        time: Learning rate times steps, in the mean form of the loss, after which training stops; None: never.
        sigma: Deviation of isotropic noise on the weights, and on the outputs.
        temperature: T of Langevin dynamics, whose stationary covariance is :math:`T/2\, H^{-1}`, H being the Hessian
            of the sum form of the objective.
        learning_rate: Of SGD on the mean form, for its stationary noise; None: a tenth of the largest stable one.
        batch_size: Of SGD.
        watch: Wraps what is iterated over, for a progress bar.

    Returns:
        The scores.
    """
    settings = {
        "kernel": run.kernel.form, "exact": run.exact, "twin": run.twin, "time": time, "ridge": run.problem.ridge,
        "sigma": sigma, "target_scale": run.method.target_scale, "information_unit": "nats",
        "validation_samples": 0 if run.validation is None else len(run.validation.index),
    }  # fmt: skip
    if time is not None:
        return _at(run, time, sigma, settings, watch)
    factor = run.factor()
    result = leave_one_out(factor, run.cross)
    replicas = run.problem.outputs // (result.leverage.shape[1] * result.leverage.shape[2])
    leverage = replicas * result.leverage.diagonal(dim1=2, dim2=3).sum((1, 2))
    steady = None
    if run.kernel.form == "full" and run.problem.samples * run.problem.outputs <= STEADY_STATE_LIMIT:
        rate = 0.1 * largest_rate(factor) if learning_rate is None else learning_rate
        steady = steady_state_information(factor, result, rate / run.problem.samples, batch_size)
        settings |= {"learning_rate": rate, "batch_size": batch_size}
    scores = _collect(run, result, factor.solution().outputs, sigma, settings | {"temperature": temperature})
    langevin = langevin_information(result.cook, 1.0, 1, temperature**0.5)
    return SampleScores(**scores, leverage=leverage, langevin_information=langevin, steady_state_information=steady)


def largest_rate(factor: DualFactor) -> float:
    """About the largest learning rate with which full-batch descent is stable, in the mean form of the loss.

    Args:
        factor: The factored problem.

    Returns:
        Two over an estimate of the largest eigenvalue of the Hessian: that of the kernel by power iteration, which
        comes from below, the ridge, and with an intercept the number of samples.
    """
    problem, matrix = factor.problem, factor.system.weighted()[0]
    vector = torch.ones(len(matrix), 1).to(matrix)
    for _ in range(50):
        vector = matrix @ (vector / vector.norm())
    samples = float(problem.root_weight.square().sum())
    return 2 * problem.samples / (float(vector.norm()) + problem.ridge + samples * problem.intercept)


def _at(run: RunProblem, time: float, sigma: float, settings: dict[str, Any], watch: Watch) -> SampleScores:
    spectrum, flow_time = run.spectrum(), time / run.problem.samples
    result = leave_one_out_flow(spectrum, flow_time, cross=run.cross, watch=watch)
    scores = _collect(run, result, flow(spectrum, flow_time).outputs, sigma, settings)
    return SampleScores(**scores, leverage=None, langevin_information=None, steady_state_information=None)


def _collect(run: RunProblem, result: Any, outputs: Tensor, sigma: float, settings: dict[str, Any]) -> dict[str, Any]:
    label = run.table.label
    right, alone = ((found.argmax(1) == label).double() for found in (outputs, result.prediction))
    change = result.function_change
    return {
        "index": run.table.index,
        "prediction": result.prediction,
        "residual": result.residual,
        "weight_information": weight_information(result.weight_change, sigma),
        "function_information": None if change is None else function_information(change, sigma),
        "memorization": right - alone,
        "suspects": label_suspects(result.prediction, label, result.residual),
        "settings": settings,
    }
