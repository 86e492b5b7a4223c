import pytest
import torch

from linear.problems import SCALES, make_toy, near, without
from lqf_lightning.information.summarize import Judged, summarize, unique_information
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.restrict import restrict_kernel, restrict_problem


def from_features(rows, others, target, judged_target, ridge=0.1):
    problem = QuadraticProblem(torch.zeros_like(target), target, ridge)
    kernel = Kernel({"all": (rows @ rows.T)[None]}, target.shape[1], "last_layer")
    cross = Kernel({"all": (others @ rows.T)[None]}, target.shape[1], "last_layer")
    return problem, kernel, Judged(cross, torch.zeros_like(judged_target), judged_target)


def clustered(copies=4, seed=0):
    """Two classes; ordinary samples come in near copies, one rare kind of each class only once."""
    draw = torch.Generator().manual_seed(seed)
    centers = 3 * torch.eye(4, dtype=torch.float64)
    kind = torch.tensor([0] * copies + [1] * copies + [2, 3])
    others = torch.arange(4).repeat(25)
    noise = [0.3 * torch.randn(len(k), 4, generator=draw, dtype=torch.float64) for k in (kind, others)]
    one_hot = torch.nn.functional.one_hot
    targets = [one_hot(k % 2, 2).double() for k in (kind, others)]
    return from_features(centers[kind] + noise[0], centers[others] + noise[1], *targets)


def test_a_copy_raises_the_other_to_the_unique_value_when_it_leaves():
    toy = make_toy(form="last_layer", outputs=2, samples=6)
    twice = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    kernel, problem = restrict_kernel(toy.kernel, rows=twice, columns=twice), restrict_problem(toy.problem, twice)
    cross = restrict_kernel(toy.cross, columns=twice)
    inner = toy.kernel.total(SCALES)[0]
    gamma = float(inner[0, 0] - inner[0, 1:] @ torch.linalg.solve(
        inner[1:, 1:] + toy.problem.ridge * torch.eye(5, dtype=torch.float64), inner[1:, 0]
    ))  # fmt: skip
    both = unique_information(DualFactor(problem, kernel, SCALES))
    alone = unique_information(DualFactor(toy.problem, toy.kernel, SCALES))
    assert float(both[0]) == pytest.approx(float(both[1]), rel=1e-10)
    # A second copy moves the weights lambda / (2 gamma + lambda) times as far as the first.
    ratio = (toy.problem.ridge / (2 * gamma + toy.problem.ridge)) ** 2
    assert float(both[0]) == pytest.approx(ratio * float(alone[0]), rel=1e-9)
    judged = Judged(cross, toy.initial_other, torch.eye(2, dtype=torch.float64)[[0, 1, 0, 1]])
    result = summarize(problem, kernel, judged, SCALES, share=0.01, least=6)
    first = int(result.order[0])
    left = torch.tensor([i for i in range(7) if i != first])
    inner = restrict_kernel(kernel, rows=left, columns=left)
    again = unique_information(
        DualFactor(restrict_problem(problem, left), inner, SCALES), restrict_kernel(cross, columns=left)
    )
    assert near(result.score[left], again)


def test_scores_without_other_samples_are_those_of_refits():
    toy = make_toy(form="full", outputs=2, samples=6)
    direction = without(toy, []).direction
    expected = [0.5 * float((direction - without(toy, [i]).direction).square().sum()) for i in range(6)]
    got = unique_information(DualFactor(toy.problem, toy.kernel, SCALES))
    assert near(got, torch.tensor(expected, dtype=torch.float64))


def test_rare_samples_stay_to_the_end():
    problem, kernel, judged = clustered()
    result = summarize(problem, kernel, judged, share=0.1, least=4)
    assert {8, 9} < set(result.best(4).tolist())
    assert sorted(result.order.tolist()) == list(range(10))
    assert result.kept.tolist() == [10, 9, 8, 7, 6, 5, 4]
    assert result.accuracy[-1] == result.accuracy[0] == 1.0


def test_it_beats_chance():
    problem, kernel, judged = clustered()
    clever = summarize(problem, kernel, judged, share=0.2, least=4).accuracy[-1]
    chance = [float(summarize(problem, kernel, judged, order="random", share=0.2, least=4, seed=s).accuracy[-1])
              for s in range(8)]  # fmt: skip
    assert float(clever) > sum(chance) / len(chance) + 0.1


def test_one_shot_scores_are_those_of_the_full_set():
    problem, kernel, judged = clustered()
    result = summarize(problem, kernel, judged, order="one_shot", share=0.1, least=2)
    full = unique_information(DualFactor(problem, kernel), judged.cross)
    assert near(result.score, full)
    label = problem.target.argmax(1)
    best = [int(torch.where(label == c, full, -1.0).argmax()) for c in range(2)]
    expected = [i for i in full.argsort(stable=True).tolist() if i not in best]
    assert result.order.tolist()[:8] == expected
    assert set(result.order.tolist()[8:]) == set(best)


def test_no_class_is_left_without_samples():
    for seed in range(3):
        problem, kernel, judged = clustered(seed=seed)
        result = summarize(problem, kernel, judged, order="random", share=0.5, seed=seed)
        assert result.kept[-1] == 2
        assert set(problem.target[result.best(2)].argmax(1).tolist()) == {0, 1}


@pytest.mark.parametrize("options", [{"order": "best"}, {"share": 0.0}, {"share": 1.0}, {"least": 0}, {"least": 11}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"got.*Set (order|share)="):
        summarize(*clustered(), **options)
