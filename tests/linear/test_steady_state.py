import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from linear.dense_ridge import DenseRidge
from linear.problems import SCALES, Toy, make_toy, near, refit, without
from lqf_lightning.information.unique_information import langevin_information
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.gradient_noise import mean_gradient_noise
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.leave_one_out import leave_one_out
from lqf_lightning.linear.steady_state import steady_state, steady_state_information

STEP, BATCH, ISOTROPIC = 1e-3, 4, 30.0
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "intercept": {"intercept": True},
    "weights": {"weights": [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "all": {"intercept": True, "linear": True, "weights": [1, 0.1, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "intercept, weights": {"intercept": True, "weights": [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]},
}


def factored(toy: Toy) -> DualFactor:
    return DualFactor(toy.problem, toy.kernel, SCALES)


def scores(toy: Toy, isotropic: float | None = ISOTROPIC) -> Tensor:
    factor = factored(toy)
    return steady_state_information(factor, leave_one_out(factor), STEP, BATCH, isotropic)


def gradient_noise(toy: Toy) -> Tensor:
    """n^2 times the covariance of one sample's gradient at the optimum, weights and intercept together."""
    dense = DenseRidge(toy.problem, toy.features[0])
    excess = dense.outputs(dense.optimum()) - toy.problem.target
    force = dense.weight[:, None] * excess + dense.linear
    gradients = torch.einsum("nc,ncp->np", force, dense.rows)[dense.weight > 0]
    result: Tensor = len(gradients) ** 2 * torch.cov(gradients.T, correction=0)
    return result


def lyapunov(hessian: Tensor, right: Tensor) -> Tensor:
    """The solution X of H X + X H = R, as one linear system for its entries."""
    unit = torch.eye(len(hessian), dtype=torch.float64)
    hessian = hessian.contiguous()
    whole = torch.kron(hessian, unit) + torch.kron(unit, hessian)
    return torch.linalg.solve(whole, right.flatten()).reshape(right.shape)


def dense_covariance(toy: Toy, isotropic: float = ISOTROPIC) -> Tensor:
    noise = gradient_noise(toy)
    noise.diagonal().add_(isotropic)
    return lyapunov(DenseRidge(toy.problem, toy.features[0]).hessian, STEP / BATCH * noise)


def at_outputs(state: Any) -> Tensor:
    rows = state.rows.flatten(0, 1)
    result: Tensor = rows @ state.covariance @ rows.T
    return result


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("body", [4, 26])  # 8 weights for 9 or 27 equations, and 30
def test_it_is_the_divergence_of_the_weights_with_and_without_each_sample(options, outputs, body):
    toy = make_toy(body=body, outputs=outputs, **options)
    sigma, full, got = dense_covariance(toy), refit(toy), scores(toy)
    for i in range(9):
        part = without(toy, [i])
        points = [torch.cat([fit.direction[0], fit.intercept][: 1 + toy.problem.intercept]) for fit in (full, part)]
        with_it, without_it = (MultivariateNormal(point, sigma) for point in points)
        # The reference adds up log-determinants that cancel, so it is good to 1e-12 at best.
        assert float(got[i]) == pytest.approx(float(kl_divergence(with_it, without_it)), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("body", [4, 26])
def test_the_covariance_at_the_outputs_is_that_of_a_lyapunov_equation_in_weight_space(options, body):
    toy = make_toy(body=body, **options)
    state = steady_state(factored(toy), STEP, BATCH, ISOTROPIC)
    rows = (toy.problem.root_weight.unsqueeze(2) * DenseRidge(toy.problem, toy.features[0]).rows).flatten(0, 1)
    assert near(at_outputs(state), rows @ dense_covariance(toy) @ rows.T)
    assert near(state.covariance, state.covariance.T, 1e-15)
    assert float(torch.linalg.eigvalsh(state.covariance).min()) > 0


def test_the_covariance_is_that_of_bartels_and_stewart():
    solvers = pytest.importorskip("scipy.linalg")
    toy = make_toy(body=6, intercept=True)
    dense, noise = DenseRidge(toy.problem, toy.features[0]), gradient_noise(toy)
    noise.diagonal().add_(ISOTROPIC)
    sigma = torch.from_numpy(solvers.solve_continuous_lyapunov(dense.hessian.numpy(), (STEP / BATCH * noise).numpy()))
    rows = dense.rows.flatten(0, 1)
    assert near(at_outputs(steady_state(factored(toy), STEP, BATCH, ISOTROPIC)), rows @ sigma @ rows.T)


def test_isotropic_noise_adds_a_multiple_of_the_inverse_hessian():
    factor = factored(make_toy(intercept=True))
    less, more = (steady_state(factor, STEP, BATCH, s) for s in (1.0, 5.0))
    assert near(more.covariance - less.covariance, torch.diag(STEP * 4.0 / (2 * BATCH) / less.curvature))


def test_sgd_settles_at_the_covariance_but_for_a_difference_linear_in_the_step():
    toy = make_toy(samples=4, outputs=2, body=1, ridge=2.0)
    factor = factored(toy)

    def gap(step: float) -> float:
        # The covariance is linear in the isotropic noise, so that without any is an extrapolation.
        once, twice = (at_outputs(steady_state(factor, step, 2, s)) for s in (1.0, 2.0))
        rows = toy.features[0].flatten(0, 1)
        exact = rows @ stationary(toy, step) @ rows.T
        return float((2 * once - twice - exact).norm() / exact.norm())

    gaps = [gap(step) for step in (1e-3, 1e-4, 1e-5)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.2)
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.02)
    assert gaps[2] < 1e-3


def stationary(toy: Toy, step: float) -> Tensor:
    """Second moment of the weights about the optimum under SGD, over all batches of two with replacement."""
    dense = DenseRidge(toy.problem, toy.features[0])
    unit = torch.eye(dense.size, dtype=torch.float64)
    excess = dense.outputs(dense.optimum()) - toy.problem.target
    moved, drawn = torch.zeros(dense.size**2, dense.size**2).double(), torch.zeros(dense.size, dense.size).double()
    batches = list(itertools.product(range(4), repeat=2))
    for batch in map(list, batches):
        rows = dense.rows[batch]
        keep = unit - step * (4 / 2 * torch.einsum("ncp,ncq->pq", rows, rows) + toy.problem.ridge * unit)
        jump = -step * (4 / 2 * torch.einsum("ncp,nc->p", rows, excess[batch]) + toy.problem.ridge * dense.optimum())
        moved += torch.kron(keep.contiguous(), keep.contiguous()) / len(batches)
        drawn += torch.outer(jump, jump) / len(batches)
    return torch.linalg.solve(torch.eye(dense.size**2).double() - moved, drawn.flatten()).reshape(drawn.shape)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]])
def test_much_isotropic_noise_makes_it_the_information_of_langevin_dynamics(options):
    toy = make_toy(**options)
    cook = leave_one_out(factored(toy)).cook
    assert near(scores(toy, 1e12), langevin_information(cook, STEP, BATCH, 1e6), 1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_eigenvectors_give_what_the_factor_gives(options):
    toy = make_toy(body=4, **options)
    spectrum = KernelSpectrum(toy.problem, toy.kernel, SCALES)
    got = steady_state_information(spectrum, leave_one_out(factored(toy)), STEP, BATCH)
    assert near(got, scores(toy, None))


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]])
def test_the_default_noise_is_a_tenth_of_the_mean_of_what_the_samples_make(options):
    toy = make_toy(**options)
    assert near(scores(toy, None), scores(toy, 0.1 * mean_gradient_noise(factored(toy))))


def test_it_is_proportional_to_the_batch_and_to_one_over_the_step():
    factor = factored(make_toy())
    result = leave_one_out(factor)
    more = steady_state_information(factor, result, STEP / 5, 3 * BATCH)
    assert near(more, 15 * steady_state_information(factor, result, STEP, BATCH))


def test_the_scale_of_targets_cancels_against_that_of_the_noise():
    toy = make_toy()
    problem = toy.problem.with_(target=toy.problem.initial + 7 * toy.problem.residual)
    factor = DualFactor(problem, toy.kernel, SCALES)
    assert near(steady_state_information(factor, leave_one_out(factor), STEP, BATCH), scores(toy, None))


def test_the_order_of_samples_and_a_rotation_of_outputs_do_not_matter():
    toy = make_toy(intercept=True)
    draw = torch.Generator().manual_seed(0)
    order, turn = torch.randperm(9, generator=draw), torch.linalg.qr(torch.randn(3, 3, generator=draw).double()).Q
    rows, whole = (3 * order[:, None] + torch.arange(3)).flatten(), torch.block_diag(*[turn] * 9)
    initial, target = toy.problem.initial[order] @ turn.T, toy.problem.target[order] @ turn.T
    kernel = Kernel({k: whole @ group[:, rows][:, :, rows] @ whole.T for k, group in toy.kernel.groups.items()}, 3)
    factor = DualFactor(toy.problem.with_(initial=initial, target=target), kernel, SCALES)
    got = steady_state_information(factor, leave_one_out(factor), STEP, BATCH, ISOTROPIC)
    assert near(got, scores(toy)[order])


def test_samples_without_gradient_or_weight_tell_nothing():
    toy = make_toy(outputs=1, weights=OPTIONS["weights"]["weights"])
    keep = (torch.arange(9) != 4).double()
    kernel = Kernel({name: group * keep * keep[:, None] for name, group in toy.kernel.groups.items()}, 1)
    factor = DualFactor(toy.problem, kernel, SCALES)
    got = steady_state_information(factor, leave_one_out(factor), STEP, BATCH)
    assert got[1] == 0
    assert float(got[4]) < 1e-20
    assert float(got[[0, 2, 3, 5, 6, 7, 8]].min()) > 1e-6


def test_weights_that_nothing_moves_tell_nothing():
    problem = make_toy().problem
    factor = DualFactor(problem, Kernel({"all": torch.zeros(1, 27, 27)}, 3))
    assert torch.equal(
        steady_state_information(factor, leave_one_out(factor), STEP, BATCH, 1.0), torch.zeros(9).double()
    )


def test_chunks_do_not_show(monkeypatch):
    toy = make_toy(intercept=True)
    whole = scores(toy)
    module = importlib.import_module("lqf_lightning.linear.steady_state")  # the package exports a function of its name
    monkeypatch.setattr(module, "_CHUNK", 2 * 3 * 30)
    assert near(scores(toy), whole, 1e-13)


@pytest.mark.parametrize("form", ["diagonal", "trace", "last_layer"])
def test_kernels_without_weights_of_their_own_are_refused(form):
    with pytest.raises(ValueError, match=f"form {form} belongs to one weight vector per output.*form full"):
        scores(make_toy(form=form))


@pytest.mark.parametrize("form", ["diagonal", "trace", "last_layer"])
def test_with_a_single_output_all_forms_are_exact(form):
    assert near(scores(make_toy(form=form, outputs=1)), scores(make_toy(outputs=1)))


def test_steps_batches_and_noise_without_a_steady_state_are_refused():
    toy = make_toy()
    factor = factored(toy)
    top = float(DenseRidge(toy.problem, toy.features[0]).hessian.diagonal().sum())
    with pytest.raises(ValueError, match="SGD settles with no step but one between 0 and"):
        steady_state(factor, 2.1 / (top / 34), BATCH, 1.0)
    with pytest.raises(ValueError, match="a batch has 1 sample or more, got 0"):
        steady_state(factor, STEP, 0, 1.0)
    with pytest.raises(ValueError, match="must be positive and finite, got 0"):
        steady_state(factor, STEP, BATCH, 0.0)
    fitted = DualFactor(toy.problem.with_(target=toy.problem.initial), toy.kernel, SCALES)
    with pytest.raises(ValueError, match="without any residual make no gradient noise"):
        steady_state(fitted, STEP, BATCH)
    with pytest.raises(ValueError, match="cannot tell from none beside the noise of the samples: take") as refusal:
        steady_state(factor, STEP, BATCH, 1e-14)
    enough = float(str(refusal.value).split("take ")[1].split(" or")[0])
    assert near(scores(toy, 1.01 * enough), scores(toy, 1.02 * enough), 0.1)


def test_what_does_not_fit_is_refused_with_numbers():
    factor = factored(make_toy())
    with pytest.raises(ValueError, match=r"of 27 rows needs 0\.0 GiB"):
        steady_state(factor, STEP, BATCH, 1.0, budget=6 * 8 * 27**2 - 1)
    with pytest.raises(ValueError, match=r"expected residuals \(9, 3\), got \(8, 3\)"):
        steady_state(factor, STEP, BATCH, 1.0).information(leave_one_out(factored(make_toy(samples=8))))
    with pytest.raises(ValueError, match="samples of weight 0 have linear terms"):
        steady_state(factored(make_toy(weights=[0] + 8 * [1], linear=True)), STEP, BATCH, 1.0)
