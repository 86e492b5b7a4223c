import pytest
import torch

from linear.dense_ridge import DenseRidge
from linear.problems import SCALES, make_toy, near
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.gradient_noise import mean_gradient_noise, pulls_of_samples
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum

OPTIONS = {
    "plain": {},
    "intercept": {"intercept": True},
    "weights": {"weights": [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "all": {"intercept": True, "linear": True, "weights": [1, 0.1, 2, 0.5, 1, 1, 3, 1, 0.2]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("solver", [DualFactor, KernelSpectrum])
def test_pulls_and_their_variance_are_those_of_gradients_in_weight_space(options, outputs, solver):
    toy = make_toy(outputs=outputs, **options)
    factor, dense = solver(toy.problem, toy.kernel, SCALES), DenseRidge(toy.problem, toy.features[0])
    force = dense.weight[:, None] * (toy.problem.target - dense.outputs(dense.optimum())) - dense.linear
    assert near(toy.problem.root_weight * pulls_of_samples(factor), force)
    gradients = torch.einsum("nc,ncp->np", force, dense.rows)[dense.weight > 0]
    trace = len(gradients) ** 2 * float(gradients.var(0, correction=0).sum())
    directions = (9 + toy.problem.intercept) * outputs
    assert mean_gradient_noise(factor) == pytest.approx(trace / directions, rel=1e-9)


def test_kernels_without_weights_of_their_own_are_refused():
    toy = make_toy(form="trace")
    with pytest.raises(ValueError, match="form trace belongs to one weight vector per output"):
        mean_gradient_noise(DualFactor(toy.problem, toy.kernel, SCALES))
