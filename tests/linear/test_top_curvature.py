import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from lqf_lightning.linear import LinearizedModel, current_reducer, fit_kfac, top_curvature
from ranks import run_on_ranks

RIDGE = 0.3


def build():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).double().eval()


def draw(number):
    return torch.randn(number, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def hessian(x):
    model = build()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    blocks = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    rows = torch.cat([block.flatten(2) for block in blocks.values()], 2).flatten(0, 1)
    return rows.T @ rows / len(x) + RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype)


def test_equals_the_largest_eigenvalue():
    x = draw(5)
    exact = torch.linalg.eigvalsh(hessian(x))[-1].item()
    found = top_curvature(LinearizedModel(build(), example=x), [x[:2], x[2:]], ridge=RIDGE, iterations=1000)
    assert found == pytest.approx(exact, rel=1e-10)


def test_equals_the_largest_eigenvalue_after_preconditioning():
    x = draw(5)
    model = LinearizedModel(build(), example=x)
    kfac = fit_kfac(model, None, [x], damping=RIDGE)
    curvature, sizes = hessian(x), [d.numel() for d in model.deltas.values()]
    columns = []
    for column in curvature.T:
        parts = {n: v.view(d.shape) for (n, d), v in zip(model.deltas.items(), column.split(sizes), strict=True)}
        columns.append(torch.cat([v.flatten() for v in kfac.precondition(parts).values()]))
    exact = torch.linalg.eigvals(torch.stack(columns, 1)).real.max().item()
    found = top_curvature(model, [x], ridge=RIDGE, precondition=kfac.precondition, iterations=400)
    assert found == pytest.approx(exact, rel=1e-8)


def test_leaves_the_model_alone():
    x = draw(4)
    model = LinearizedModel(build(), example=x)
    with torch.no_grad():
        for delta in model.deltas.values():
            delta.fill_(0.1)
    top_curvature(model, [x], ridge=RIDGE)
    assert all(torch.equal(d, torch.full_like(d, 0.1)) and d.grad is None for d in model.deltas.values())


@pytest.mark.parametrize("world_size", [2, 3])
def test_is_the_same_on_every_number_of_ranks(world_size):
    x = draw(5)
    single = top_curvature(LinearizedModel(build(), example=x), [x], ridge=RIDGE)

    def share():
        reducer = current_reducer()
        own = x.tensor_split([1, 5, 5][: world_size - 1])[reducer.rank]  # of three ranks the last has none
        model = LinearizedModel(build(), example=x)
        return top_curvature(model, [own] if len(own) else [], ridge=RIDGE, reducer=reducer)

    assert run_on_ranks(world_size, share) == pytest.approx([single] * world_size, rel=1e-12)


def test_refuses_what_has_no_curvature():
    x = draw(2)
    with pytest.raises(ValueError, match="no sample"):
        top_curvature(LinearizedModel(build(), example=x), [], ridge=RIDGE)
