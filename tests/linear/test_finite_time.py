import pytest
import torch
from torch import Tensor

from linear.problems import SCALES, Toy, blockwise, make_toy, near
from lqf_lightning.linear.dual import solve_dual
from lqf_lightning.linear.finite_time import descend, flow
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum

FORMS = ["full", "diagonal", "trace", "last_layer"]
WEIGHTS = [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]
OPTIONS = {
    "plain": {},
    "weights": {"weights": WEIGHTS},
    "all": {"intercept": True, "linear": True, "weights": [1, 0.1, 2, 0.5, 1, 1, 3, 1, 0.2]},
}
STEP = 1e-3


def spectrum(toy: Toy) -> KernelSpectrum:
    return KernelSpectrum(toy.problem, toy.kernel, SCALES)


def outputs_of_a_loop(toy: Toy, steps: int) -> Tensor:
    """Gradient descent on the weights, the intercept fitted anew before every step."""
    problem, weight = toy.problem, toy.problem.root_weight.square()
    outputs = problem.initial.double().clone()
    for features, _, columns in blockwise(toy):
        direction = torch.zeros(features.shape[2], dtype=torch.float64)
        linear, residual = problem.linear_terms[:, columns], problem.residual[:, columns]

        def level(error: Tensor, linear: Tensor = linear) -> Tensor:
            return (weight * error - linear).sum(0) / weight.sum() * problem.intercept

        for _ in range(steps):
            error = residual - features @ direction
            pull = weight * (error - level(error)) - linear
            direction = direction + STEP * (torch.einsum("icp,ic->p", features, pull) - problem.ridge * direction)
        moved = features @ direction
        outputs[:, columns] += moved + level(residual - moved)
    return outputs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_descent_stands_where_a_loop_over_the_weights_stands(form, ridge, outputs, options):
    toy = make_toy(form=form, ridge=ridge, outputs=outputs, **options)
    for steps in (0, 1, 50):
        assert near(descend(spectrum(toy), STEP, steps).outputs, outputs_of_a_loop(toy, steps))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_small_steps_follow_the_flow_and_both_end_at_the_optimum(options):
    toy = make_toy(**options)
    decomposed, optimum = spectrum(toy), solve_dual(toy.problem, toy.kernel, SCALES)
    gaps = [
        float((descend(decomposed, 0.02 / steps, steps).outputs - flow(decomposed, 0.02).outputs).norm())
        for steps in (200, 400)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.02)
    assert near(descend(decomposed, STEP, 10**6).outputs, optimum.outputs)
    assert near(flow(decomposed, 1e3).outputs, optimum.outputs)


def test_the_certificate_shrinks_with_time():
    decomposed = spectrum(make_toy(intercept=True))
    gradients = [descend(decomposed, STEP, steps).certificate.relative_gradient for steps in (0, 10, 100, 10**6)]
    assert gradients[0] == pytest.approx(1, rel=1e-12)
    assert gradients == sorted(gradients, reverse=True)
    assert gradients[-1] < 1e-12


def test_steps_on_both_sides_of_the_turning_point_agree_with_the_loop():
    toy = make_toy()
    decomposed = spectrum(toy)
    top = float(decomposed.values.max()) + 1
    for share in (0.49, 0.51, 0.99, 1.0, 1.5, 1.99):
        exact = decomposed.dual(
            lambda values, eta=share / top: sum((1 - eta * (values + 1)) ** t for t in range(7)) * eta
        )
        assert near(descend(decomposed, share / top, 7).coefficients, exact.reshape(9, 3))


@pytest.mark.parametrize(("share", "steps"), [(2.01, 3), (0.0, 3), (-0.5, 3), (0.5, -1)])
def test_descent_that_diverges_is_refused_with_the_longest_step(share, steps):
    decomposed = spectrum(make_toy())
    top = float(decomposed.values.max()) + 1
    with pytest.raises(ValueError, match=rf"a step between 0 and {2 / top:.4g}".replace(".", r"\.")):
        descend(decomposed, share / top, steps)


@pytest.mark.parametrize("time", [-1.0, float("inf"), float("nan")])
def test_times_that_are_none_are_refused(time):
    with pytest.raises(ValueError, match="finite and not negative"):
        flow(spectrum(make_toy()), time)
