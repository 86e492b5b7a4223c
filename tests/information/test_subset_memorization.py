from dataclasses import replace
from itertools import combinations

import pytest
import torch

from linear.problems import SCALES, make_toy, refit, without
from lqf_lightning.information.memorization import influence, memorization
from lqf_lightning.information.subset_memorization import (
    OtherSamples,
    leave_one_out_memorization,
    subset_memorization,
)
from lqf_lightning.linear import DualFactor, leave_one_out

CASES = [
    {"form": "full"},
    {"form": "full", "intercept": True, "ridge": 0.3},
    {"form": "full", "intercept": True, "weights": [1.0, 2.0, 0.5, 1.0, 3.0, 0.25], "linear": True},
    {"form": "trace", "intercept": True},
    {"form": "diagonal"},
    {"form": "last_layer"},
]
SAMPLES, LABEL, OTHER_LABEL = 6, torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([2, 1, 0, 0])


def toy(case, seed=3):
    made = make_toy(samples=SAMPLES, seed=seed, body=6, **case)
    labels = torch.nn.functional.one_hot(LABEL, 3).double()
    return replace(made, problem=made.problem.with_(target=4 * labels))


def subsets(size):
    return list(combinations(range(SAMPLES), size))


def masks(size):
    rows = torch.zeros(len(subsets(size)), SAMPLES, dtype=torch.bool)
    for row, chosen in zip(rows, subsets(size), strict=True):
        row[list(chosen)] = True
    return rows


def refitted(made, chosen, kept):
    """The ridge fit in weight space to some samples, asked about all."""
    ridge = made.problem.ridge * (len(chosen) / SAMPLES if kept == "mean" else 1)
    fit = refit(replace(made, problem=made.problem.with_(ridge=ridge)), chosen)
    return fit.outputs.argmax(1) == LABEL, fit.outputs_other.argmax(1) == OTHER_LABEL


@pytest.mark.parametrize("kept", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_estimates_from_all_subsets_are_the_exact_expectations(case, kept):
    """Of every size: the answers of each model, memorization, influence and the C-score, counted by hand."""
    made = toy(case)
    others, right = OtherSamples(made.cross, made.initial_other, OTHER_LABEL), set()
    for size in (2, 4, 5):
        chosen = subsets(size)
        models = subset_memorization(
            made.problem, made.kernel, LABEL, masks(size), scales=SCALES, others=others, ridge=kept
        )
        answers, answers_other = (
            torch.stack(part) for part in zip(*[refitted(made, s, kept) for s in chosen], strict=True)
        )
        assert torch.equal(models.correct, answers)
        assert torch.equal(models.correct_other, answers_other)
        found, (effect,) = memorization(masks(size), models.correct), influence(masks(size), models.correct_other)
        for i in range(SAMPLES):
            inside = torch.tensor([i in s for s in chosen])
            with_it, without_it = answers[inside].double(), answers[~inside].double()
            assert found.c_score[i].item() == pytest.approx(without_it[:, i].mean().item())
            assert found.memorization[i].item() == pytest.approx((with_it - without_it.mean(0)).mean(0)[i].item())
            moved = answers_other[inside].double().mean(0) - answers_other[~inside].double().mean(0)
            assert effect.influence[:, i].tolist() == pytest.approx(moved.tolist())
        right.add(float(answers_other.double().mean()))
    assert max(right) > 0
    assert min(right) < 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_samples_but_one_are_the_limit(case):
    seen = set()
    for seed in range(6):
        made = toy(case, seed)
        factor = DualFactor(made.problem, made.kernel, SCALES)
        found = leave_one_out_memorization(factor.solution().outputs, leave_one_out(factor), LABEL)
        whole = refit(made).outputs.argmax(1) == LABEL
        alone = [without(made, [i]).outputs[i].argmax() == LABEL[i] for i in range(SAMPLES)]
        assert found.tolist() == (whole.long() - torch.stack(alone).long()).tolist()
        both = torch.cat([torch.ones(1, SAMPLES, dtype=torch.bool), ~torch.eye(SAMPLES, dtype=torch.bool)])
        models = subset_memorization(made.problem, made.kernel, LABEL, both, scales=SCALES, ridge="sum")
        assert found.tolist() == (models.correct[0].long() - models.correct[1:].diagonal().long()).tolist()
        seen |= set(found.tolist())
    assert {0, 1} <= seen  # else nothing was compared


def test_masks_that_do_not_fit_are_refused():
    made = toy({"form": "full"})
    for mask, said in (
        (torch.ones(2, 5, dtype=torch.bool), r"\(T, 6\) .* got \(2, 5\) with 0 empty"),
        (torch.eye(6, dtype=torch.bool).index_fill(0, torch.tensor(1), False), r"got \(6, 6\) with 1 empty"),
    ):
        with pytest.raises(ValueError, match=said):
            subset_memorization(made.problem, made.kernel, LABEL, mask)
    result = leave_one_out(DualFactor(made.problem, made.kernel))
    with pytest.raises(ValueError, match="6 outputs, 6 predictions and 2 labels"):
        leave_one_out_memorization(torch.zeros(6, 3), result, LABEL[:2])
