from typing import Any

import pytest
import torch
from torch import Tensor

from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.growing_dual import GrowingDual
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.leave_one_out import leave_one_out
from lqf_lightning.linear.problem import QuadraticProblem

EXACT = 1e-10  # relative, float64: condition numbers up to 1e3
SCALES = {"body": 0.5, "head": 2.0}


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(form: Any, left: Tensor, right: Tensor, outputs: int = 3) -> Kernel:
    """Features (n, C, D) for "full", (C, n, D) for "diagonal", (1, n, D) else."""
    groups = {}
    for name, part in (("body", slice(0, 4)), ("head", slice(4, 9))):
        a, b = left[..., part], right[..., part]
        flat = (a.flatten(0, 1)[None], b.flatten(0, 1)[None]) if form == "full" else (a, b)
        groups[name] = flat[0] @ flat[1].mT
    return Kernel(groups, outputs, form)


def make(form: Any, intercept: bool = True) -> tuple[QuadraticProblem, Tensor]:
    size = {"full": (8, 3, 9), "diagonal": (3, 8, 9), "trace": (1, 8, 9)}[form]
    return QuadraticProblem(draw(3, 8, 3), draw(4, 8, 3), 0.2, draw(2, 8).abs(), draw(5, 8, 3), intercept), draw(
        1, *size
    )


def pick(problem: QuadraticProblem, chosen: slice) -> QuadraticProblem:
    names = ("initial", "target", "weight", "linear")
    return problem.with_(**{n: None if getattr(problem, n) is None else getattr(problem, n)[chosen] for n in names})


def agree(got: DualFactor, want: DualFactor) -> None:
    left, right = got.solution(), want.solution()
    assert left.coefficients is not None
    assert right.coefficients is not None
    pairs = [(left.coefficients, right.coefficients), (left.outputs, right.outputs), (got.lower, want.lower)]
    removed = leave_one_out(got), leave_one_out(want)
    pairs += [(getattr(removed[0], n), getattr(removed[1], n)) for n in ("residual", "weight_change", "cook")]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= EXACT * theirs.norm()
    assert left.certificate.relative_gradient <= 1e-12


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("chunks", [[5, 3], [2, 1, 4, 1]], ids=str)
def test_growing_gives_the_factor_of_all_samples(form: Any, intercept: bool, chunks: list[int]) -> None:
    problem, rows = make(form, intercept)
    take = (lambda part: rows[part]) if form == "full" else (lambda part: rows[:, part])
    end = chunks[0]
    first = slice(0, end)
    factor = GrowingDual.of(DualFactor(pick(problem, first), kernel(form, take(first), take(first)), SCALES))
    for chunk in chunks[1:]:
        old, new = take(slice(0, end)), take(slice(end, end + chunk))
        part = pick(problem, slice(end, end + chunk))
        factor = factor.grow(part, kernel(form, new, old), kernel(form, new, new))
        end += chunk
    agree(factor, DualFactor(problem, kernel(form, rows, rows), SCALES))


def test_new_classes_share_the_kernel_of_a_probe() -> None:
    problem, rows = make("trace")
    factor = GrowingDual.of(DualFactor(problem, kernel("trace", rows, rows), SCALES))
    wider = problem.with_(
        initial=torch.cat([problem.initial, draw(8, 8, 2)], 1),
        target=torch.cat([problem.target, draw(9, 8, 2)], 1),
        linear=torch.cat([problem.linear_terms, torch.zeros(8, 2)], 1),
    )
    agree(factor.grow_outputs(draw(8, 8, 2), draw(9, 8, 2)), DualFactor(wider, kernel("trace", rows, rows, 5), SCALES))


def test_what_cannot_grow_is_said() -> None:
    problem, rows = make("full")
    whole = kernel("full", rows, rows)
    factor = GrowingDual.of(DualFactor(problem, whole))
    with pytest.raises(ValueError, match="own rows in a full kernel"):
        factor.grow_outputs(torch.zeros(8, 1), torch.zeros(8, 1))
    with pytest.raises(ValueError, match=r"ridge 0.2 and intercept=True, the new ones 0.3"):
        factor.grow(problem.with_(ridge=0.3), whole, whole)
    with pytest.raises(ValueError, match=r"\(m, 24\) and \(m, m\); got \(24, 9\)"):
        factor.grow(problem, kernel("full", rows, rows[:3]), whole)
    with pytest.raises(ValueError, match=r"is full, 3 outputs, groups .*; got trace"):
        factor.grow(problem, Kernel(whole.groups, 3, "trace"), whole)
