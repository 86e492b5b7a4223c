from typing import Any

import pytest
import torch
from torch import Tensor

from linear.dense_ridge import DenseRidge, metric_matrix, network_jacobian, normal
from linear.nets import build_net
from lqf_lightning.linear import LinearizedModel
from lqf_lightning.linear.conjugate_gradient import ConjugateGradient
from lqf_lightning.linear.dual_system import DualSystem
from lqf_lightning.linear.jacobian import StreamedJacobian
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.least_gradient import LeastGradient
from lqf_lightning.linear.metric import Metric
from lqf_lightning.linear.predict_scrub import predict_scrub
from lqf_lightning.linear.problem import QuadraticProblem

SAMPLES, HEAD = 7, "6.bias"
KEPT = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "intercept": {"intercept": True},
    "weights": {"intercept": True, "weight": torch.linspace(0.5, 2, SAMPLES).double()},
    "linear": {"linear": normal(SAMPLES, 3, seed=9)},
}


class Case:
    """A network, its problem with all samples, and the same without two of them."""

    def __init__(self, options: dict[str, Any], metric: Metric) -> None:
        x = normal(SAMPLES, 3, 8, 8, seed=1)
        net = build_net("residual")
        self.names = [name for name, _ in net.named_parameters() if name != HEAD]
        initial = net(x).detach()
        self.whole = QuadraticProblem(initial, 5 * normal(SAMPLES, 3, seed=2), 7.0, **options)
        weight = KEPT if self.whole.weight is None else KEPT * self.whole.weight
        linear = None if self.whole.linear is None else KEPT[:, None] * self.whole.linear
        self.kept = self.whole.with_(weight=weight, linear=linear, ridge=5.0)
        rows, shapes = network_jacobian(net, x, self.names), {n: net.get_parameter(n).shape for n in self.names}
        matrix = metric_matrix(metric, shapes)
        dense = DenseRidge(self.whole, rows, matrix)
        self.start = dense.optimum()[: dense.size]
        error = self.whole.root_weight.square() * (dense.outputs(dense.optimum()) - self.whole.target)
        self.coefficients = -(error + self.whole.linear_terms) / self.whole.ridge
        flat = rows[:, :, : dense.size].flatten(0, 1)
        kernel = Kernel({"all": (flat @ torch.linalg.solve(matrix, flat.T)).unsqueeze(0)}, outputs=3)
        self.system = DualSystem(self.whole, kernel, None, copies=1, budget=2**24)
        self.jacobian, self.metric = StreamedJacobian(LinearizedModel(net, example=x), x.split(3)), metric
        parts = self.start.split([shape.numel() for shape in shapes.values()])
        self.movement = {n: part.view(shapes[n]) for n, part in zip(self.names, parts, strict=True)}

    def real(self, tolerance: float) -> tuple[list[float], list[float]]:
        """Conjugate gradients on the network and their combinations, from the optimum on all samples."""
        zero = ConjugateGradient(
            self.kept, {n: torch.zeros_like(v) for n, v in self.movement.items()}, metric=self.metric
        )
        zero.receive_gradient(self.jacobian.pull(zero.residual)[0])
        (image,) = self.jacobian.push(self.movement)
        descent = ConjugateGradient(
            self.kept, self.movement, metric=self.metric, image=image, reference=zero.reference
        )  # fmt: skip
        descent.receive_gradient(self.jacobian.pull(descent.residual)[0])
        least = LeastGradient(descent)
        proofs = [least.certificate]
        while proofs[-1].relative_gradient > tolerance:
            descent.receive_image(self.jacobian.push(descent.direction)[0])
            descent.receive_gradient(self.jacobian.pull(descent.residual)[0])
            least.update()
            proofs.append(least.certificate)
        return [p.relative_gradient for p in proofs], [p.distance_bound for p in proofs]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "metric", [Metric(), Metric({"3.conv1.weight": 4.0, "6.weight": 0.5})], ids=["plain", "groups"]
)
def test_the_steps_are_those_of_conjugate_gradients_on_the_network(options, metric):
    case = Case(options, metric)
    relative, bound = case.real(1e-5)
    forecast = predict_scrub(case.system, case.kept, case.coefficients, tolerance=1e-5)
    assert forecast.steps == len(relative) - 1 >= 3
    assert forecast.reached
    # Two orders of the same sums; conjugate gradients amplify rounding as they go.
    assert list(forecast.relative_gradient) == pytest.approx(relative, rel=1e-5)
    assert list(forecast.distance_bound) == pytest.approx(bound, rel=1e-5)


def test_a_scrub_of_nothing_takes_no_step():
    case = Case({"intercept": True}, Metric())
    forecast = predict_scrub(case.system, case.whole, case.coefficients, tolerance=1e-9)
    assert (forecast.steps, forecast.sweeps, forecast.passes) == (0, 2, pytest.approx(1.6))


def test_a_forecast_gives_up_where_it_is_told_to():
    case = Case({}, Metric())
    forecast = predict_scrub(case.system, case.kept, case.coefficients, tolerance=1e-9, max_steps=2)
    assert forecast.steps == 2
    assert not forecast.reached
    assert (forecast.sweeps, forecast.passes) == (8, pytest.approx(5.2))


@pytest.mark.parametrize(
    ("start", "tolerance", "text"),
    [
        (torch.zeros(SAMPLES, 3), 0.0, "tolerance must be positive and finite, got 0"),
        (torch.zeros(SAMPLES - 1, 3), 1e-3, r"expected coefficients \(7, 3\), got \(6, 3\)"),
    ],
)
def test_what_makes_no_sense_is_refused(start: Tensor, tolerance: float, text: str) -> None:
    case = Case({}, Metric())
    with pytest.raises(ValueError, match=text):
        predict_scrub(case.system, case.kept, start, tolerance=tolerance)
