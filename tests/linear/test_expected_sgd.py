import itertools

import pytest
import torch

from lqf_lightning.linear.expected_sgd import ExpectedSGD
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.output_loss import SquaredOutputLoss
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.training_curve import training_curve
from lqf_lightning.linear.training_rule import TrainingRule

RATES = torch.tensor([0.3, 0.2, 0.25], dtype=torch.float64)


def build(samples, outputs, form="full", width=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731  # short
    rows = 0.6 * normal(samples, outputs, width)
    if form == "full":
        blocks = (rows.flatten(0, 1) @ rows.flatten(0, 1).T).unsqueeze(0)
    else:
        blocks = torch.stack([rows[:, c] @ rows[:, c].T for c in range(outputs)])
        blocks = blocks.mean(0, keepdim=True) if form == "trace" else blocks
    problem = QuadraticProblem(normal(samples, outputs), 2 * normal(samples, outputs), 1.0)
    return problem, Kernel({"all": blocks}, outputs, form)


def enumerate_batches(problem, kernel, batch, rates):
    """Mean over every sequence of batches of the loss along the way."""
    subsets = [torch.tensor(rows) for rows in itertools.combinations(range(problem.samples), batch)]
    total = torch.zeros(len(rates) + 1, dtype=torch.float64)
    sequences = list(itertools.product(subsets, repeat=len(rates)))
    loss, rule = SquaredOutputLoss(problem.target), TrainingRule(rates)
    for sequence in sequences:
        total += training_curve(kernel, problem.initial, loss, rule, batches=sequence).loss
    return total / len(sequences)


@pytest.mark.parametrize(("outputs", "form"), [(1, "full"), (2, "full"), (2, "trace"), (2, "diagonal")])
def test_the_expected_loss_is_the_mean_over_all_sequences_of_batches(outputs, form):
    problem, kernel = build(5, outputs, form)
    expected = enumerate_batches(problem, kernel, 2, RATES)
    found = ExpectedSGD(KernelSpectrum(problem, kernel), batch=2).loss(RATES)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("outputs", [1, 3])
def test_batches_of_all_samples_are_gradient_descent(outputs):
    problem, kernel = build(8, outputs)
    rates = torch.full((30,), 0.2, dtype=torch.float64)
    descent = training_curve(kernel, problem.initial, SquaredOutputLoss(problem.target), TrainingRule(rates)).loss
    expected = ExpectedSGD(KernelSpectrum(problem, kernel), batch=8)
    torch.testing.assert_close(expected.loss(rates), descent, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(expected.diagonal_loss(rates), descent, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_leaving_correlations_out_is_exact_for_two_steps_and_near_for_many(outputs):
    problem, kernel = build(12, outputs, width=20)
    expected = ExpectedSGD(KernelSpectrum(problem, kernel), batch=4)
    rates = torch.full((60,), 0.1, dtype=torch.float64)
    exact, near = expected.loss(rates), expected.diagonal_loss(rates)
    first = expected.start @ expected.start.mT  # correlations of the start enter the noise of the first step
    assert float(first[0].abs().sum() - first[0].diagonal().abs().sum()) > 0
    assert float(((near - exact) / exact).abs().max()) < 0.3
    assert float(((near - exact) / exact).abs().max()) > 1e-6


def test_leading_modes_are_near_and_the_others_stay():
    problem, kernel = build(12, 2, width=6)  # of 24 eigenvalues, 6 are not zero
    spectrum = KernelSpectrum(problem, kernel)
    rates = torch.full((20,), 0.1, dtype=torch.float64)
    exact = ExpectedSGD(spectrum, batch=4).loss(rates)
    torch.testing.assert_close(ExpectedSGD(spectrum, 4, modes=6).loss(rates), exact, rtol=1e-9, atol=1e-12)
    fewer = ExpectedSGD(spectrum, 4, modes=5)
    found = fewer.loss(rates)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-12, atol=0)
    assert float(found[-1]) > fewer.floor / (2 * 12)
    assert float(found[-1] - exact[-1]) > 1e-3


def test_what_has_no_moments_is_refused():
    problem, kernel = build(5, 1)
    spectrum = KernelSpectrum(problem, kernel)
    for batch, modes in ((0, None), (6, None), (2, 0), (2, 6)):
        with pytest.raises(ValueError, match="1 to 5 samples and 1 to 5 modes"):
            ExpectedSGD(spectrum, batch, modes)
    weighted = problem.with_(weight=torch.ones(5))
    with pytest.raises(ValueError, match="without intercept"):
        ExpectedSGD(KernelSpectrum(weighted, kernel), 2)
