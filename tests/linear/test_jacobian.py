import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear.nets import build_net, dense_jacobian, push, random_direction
from lqf_lightning.linear import DistributedReducer, FoldedJacobian, LinearizedModel, exactly
from lqf_lightning.linear.jacobian import StreamedJacobian, pull_batch, push_batch, push_pull_batch
from ranks import run_on_ranks

EXACT = 1e-12  # relative, float64: a few thousand roundings of 1e-16

Direction = dict[str, Tensor]


def transposed(jacobian: Direction, rows: Tensor) -> Direction:
    return {name: torch.tensordot(rows, entry, 2) for name, entry in jacobian.items()}


def same(got: Direction, want: Direction, tolerance: float = EXACT) -> bool:
    scale = sum(v.square().sum() for v in want.values()).sqrt()
    return got.keys() == want.keys() and all((got[n] - want[n]).norm() <= tolerance * scale for n in want)


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= tolerance * want.norm())


@pytest.fixture(params=["jvp", "vjp"])
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_products_are_those_of_the_dense_jacobian(net: nn.Module, x: Tensor, rows: Tensor, mode: Any) -> None:
    dense, value = dense_jacobian(net, x), copy.deepcopy(net)(x).detach()
    directions = [random_direction(net, seed) for seed in (4, 5)]
    streamed = StreamedJacobian(LinearizedModel(net, example=x, mode=mode), x.split(2))
    assert close(streamed.initial(), value)
    for got, direction in zip(streamed.push(*directions), directions, strict=True):
        assert close(got, push(dense, direction))
    for gradient, row in zip(streamed.pull(*rows), rows, strict=True):
        assert same(gradient, transposed(dense, row))


def test_a_push_evaluates_the_network_on_the_way(net: nn.Module, x: Tensor, mode: Any) -> None:
    direction, value = random_direction(net, 4), copy.deepcopy(net)(x).detach()
    model, dense = LinearizedModel(net, example=x, mode=mode), dense_jacobian(net, x)
    with exactly(x.device, False):
        jacobian = FoldedJacobian(model, x)
        (tangents,) = jacobian.fold([{name: direction[name] for name in list(direction)[-2:]}])
        got, pushed = jacobian.value_and_push(x, tangents)
    moved = {name: entry if name in list(direction)[-2:] else 0 * entry for name, entry in direction.items()}
    assert close(got, value)
    assert close(pushed, push(dense, moved))


def test_fused_product_is_the_weighted_gauss_newton_matrix(net: nn.Module, x: Tensor, rows: Tensor, mode: Any) -> None:
    dense, weight = dense_jacobian(net, x), torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    directions = [random_direction(net, seed) for seed in (4, 5)]
    streamed = StreamedJacobian(LinearizedModel(net, example=x, mode=mode), x.split(2))
    pushed, pulled = streamed.push_pull(*directions, weight=weight, shift=rows)
    for k, direction in enumerate(directions):
        expected = push(dense, direction)
        assert close(pushed[k], expected)
        assert same(pulled[k], transposed(dense, weight[:, None] * (expected - rows[k])))
    _, (plain,) = streamed.push_pull(directions[0])
    assert same(plain, transposed(dense, push(dense, directions[0])))


def test_fused_product_takes_one_evaluation_where_the_mode_allows(x: Tensor, mode: Any) -> None:
    net = build_net("residual")
    streamed = StreamedJacobian(LinearizedModel(net, example=x, mode=mode), x.split(2))
    evaluations = []
    streamed.model.folded(x).structure.register_forward_pre_hook(lambda *_: evaluations.append(1))
    streamed.push_pull(random_direction(net))
    assert len(evaluations) == 3 * (1 if mode == "jvp" else 2)
    evaluations.clear()
    streamed.pull(*torch.ones(4, 5, 3, dtype=torch.float64))
    assert len(evaluations) == 3


def test_adjoint_identity_and_linearity(net: nn.Module, x: Tensor, rows: Tensor) -> None:
    a, b = random_direction(net, 4), random_direction(net, 5)
    streamed = StreamedJacobian(LinearizedModel(net, example=x), x.split(3))
    left, right, both = streamed.push(a, b, {name: 2 * a[name] - 3 * b[name] for name in a})
    assert close(both, 2 * left - 3 * right)
    across, back = (rows[0] * left).sum(), sum((g * a[n]).sum() for n, g in streamed.pull(rows[0])[0].items())
    assert abs(across - back) <= EXACT * rows[0].norm() * left.norm()


def test_one_batch_at_a_time_adds_up_to_the_pass(net: nn.Module, x: Tensor, rows: Tensor, mode: Any) -> None:
    model, direction = LinearizedModel(net, example=x, mode=mode), random_direction(net)
    streamed, total = StreamedJacobian(model, [x]), None
    for part in (slice(0, 2), slice(2, 5)):
        (pushed,) = push_batch(model, x[part], [direction])
        assert close(pushed, streamed.push(direction)[0][part])
        (pulled,) = pull_batch(model, x[part], [rows[0, part]])
        (again,), (fused,) = push_pull_batch(model, x[part], [direction], lambda _, part=part: [rows[0, part]])
        assert close(again, pushed)
        assert same(fused, pulled)
        total = pulled if total is None else {n: total[n] + g for n, g in pulled.items()}
    assert same(total or {}, streamed.pull(rows[0])[0])


def test_parameters_left_out_do_not_move_and_those_not_linearized_are_unknown(x: Tensor, rows: Tensor) -> None:
    net = build_net("depthwise")
    names = ["0.weight", "1.bias", "7.weight"]
    dense, direction = dense_jacobian(net, x), random_direction(net)
    streamed = StreamedJacobian(LinearizedModel(net, names, example=x), [x])
    expected = push(dense, {"1.bias": direction["1.bias"]})
    assert close(streamed.push({"1.bias": direction["1.bias"]})[0], expected)
    (pushed,), (pulled,) = streamed.push_pull({"1.bias": direction["1.bias"]})
    assert close(pushed, expected)
    assert same(pulled, transposed({name: dense[name] for name in names}, expected))
    with pytest.raises(ValueError, match=r"'0.bias' is not among .* 0.weight"):
        streamed.push({"0.bias": direction["0.weight"]})


def test_parameters_without_a_part_in_the_output_have_a_zero_product() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Any:
            return self.used(inputs)

    net = Partly().double()
    inputs = torch.randn(3, 4, dtype=torch.float64)
    (pulled,) = StreamedJacobian(LinearizedModel(net, example=inputs), [inputs]).pull(torch.ones(3, 2).double())
    assert pulled["idle.weight"].tolist() == torch.zeros(2, 4).tolist()
    assert close(pulled["used.weight"], inputs.sum(0).expand(2, 4))


def test_surroundings_do_not_change_the_products(x: Tensor) -> None:
    model = LinearizedModel(build_net("residual", torch.float32), example=x.float())
    streamed, row = StreamedJacobian(model, [x.float()]), torch.ones(5, 3)
    direction = {n: d.float() for n, d in random_direction(model.model).items()}
    expected = streamed.push_pull(direction), streamed.pull(row)[0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        copied = StreamedJacobian(model, [x.float()])  # made in inference mode
        (pushed,), (fused,) = copied.push_pull(direction)
        pulled = copied.pull(row)[0]
    assert torch.equal(pushed, expected[0][0][0])
    assert all(torch.equal(fused[n], expected[0][1][0][n]) for n in fused)
    assert all(torch.equal(pulled[n], expected[1][n]) for n in pulled)
    assert not any(p.requires_grad for p in model.model.parameters())
    assert all(d.grad is None and not d.any() for d in model.deltas.values())


def test_sums_over_many_batches_lose_nothing(x: Tensor) -> None:
    net = nn.Linear(1, 1, bias=False)
    inputs = torch.cat([torch.tensor([[2.0**24]]), torch.ones(64, 1)])
    streamed = StreamedJacobian(LinearizedModel(net, example=inputs), inputs.split(1))
    # In single precision adding 1 to 2^24 changes nothing.
    assert streamed.pull(torch.ones(65, 1))[0]["weight"].item() == 2.0**24 + 64


def test_wrong_batches_and_rows_are_refused(x: Tensor) -> None:
    model = LinearizedModel(build_net("residual"), example=x)
    with pytest.raises(TypeError, match=r"generator, which is spent after one pass.*give a list or a data loader"):
        StreamedJacobian(model, (part for part in x.split(2)))
    with pytest.raises(ValueError, match="no sample"):
        StreamedJacobian(model, []).push(random_direction(model.model))
    for count, word in ((4, "fewer than there are samples"), (6, "more than the 5 samples")):
        with pytest.raises(ValueError, match=f"have {count} rows, {word}"):
            StreamedJacobian(model, x.split(2)).pull(torch.zeros(count, 3).double())


def test_progress_is_watched_once_per_batch(x: Tensor) -> None:
    seen = []

    def watch(batches: Any) -> Iterator[Tensor]:
        for batch in batches:
            seen.append(len(batch))
            yield batch

    model = LinearizedModel(build_net("residual"), example=x)
    StreamedJacobian(model, x.split(2), watch=watch).push_pull(random_direction(model.model))
    assert seen == [2, 2, 1]


def test_shards_of_any_size_add_up(x: Tensor, rows: Tensor) -> None:
    net, direction = build_net("residual"), random_direction(build_net("residual"))
    expected = StreamedJacobian(LinearizedModel(copy.deepcopy(net), example=x), [x]).push_pull(direction)[1][0]

    def work(cuts: list[int]) -> Direction:
        reducer = DistributedReducer()
        own = x[cuts[reducer.rank] : cuts[reducer.rank + 1]]
        _, (pulled,) = StreamedJacobian(LinearizedModel(copy.deepcopy(net), example=x), own.split(2)).push_pull(
            direction
        )
        return {name: reducer.sum_(entry) for name, entry in pulled.items()}

    for got in run_on_ranks(3, work, [0, 1, 4, 5]):
        assert same(got, expected)
