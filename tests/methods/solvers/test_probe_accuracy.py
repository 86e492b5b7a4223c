import pytest
import torch

from lqf_lightning.linear import Kernel, QuadraticProblem
from lqf_lightning.methods.solvers.probe_accuracy import probe_accuracy

CLASSES, SAMPLES = 3, 24


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FEATURES = normal(SAMPLES, 5) + 0.5
LABEL = (FEATURES[:, :CLASSES] + 0.8 * normal(SAMPLES, CLASSES, seed=1)).argmax(1)
BODY = normal(SAMPLES * CLASSES, 60, seed=2)


def problem(label=LABEL, **changes):
    target = 15 * torch.nn.functional.one_hot(label, CLASSES).double()
    return QuadraticProblem(normal(SAMPLES, CLASSES, seed=3), target, 1.0, intercept=True).with_(**changes)


def kernel(form, features=FEATURES):
    """Head and body in any form; the head's of the full one is that of J = features x I."""
    jacobian = torch.kron(features, torch.eye(CLASSES, dtype=torch.float64))
    full = {"body": BODY @ BODY.T, "head": jacobian @ jacobian.T}
    if form == "full":
        return Kernel({name: matrix[None] for name, matrix in full.items()}, CLASSES)
    blocks = {
        name: torch.stack([matrix[c::CLASSES, c::CLASSES] for c in range(CLASSES)]) for name, matrix in full.items()
    }
    trace = {name: block.mean(0, keepdim=True) for name, block in blocks.items()}
    return Kernel(blocks if form == "diagonal" else trace, CLASSES, form)


def refitted(given, counted=None, together=None, features=FEATURES):
    """The accuracies over ridges of probes that are fitted again without each set, by normal equations."""
    weight = given.root_weight[:, 0].square()
    together = torch.arange(SAMPLES) if together is None else together
    root = weight.sqrt()[:, None]
    seen = root * features
    if given.intercept:  # the mean eigenvalue is that of what the intercept leaves over
        seen = seen - root @ (root.T @ seen) / root.square().sum()
    scale = seen.square().sum() / (SAMPLES - given.intercept)
    design = torch.cat([features, torch.ones(SAMPLES, 1, dtype=torch.float64)], 1) if given.intercept else features
    counted = weight * (torch.ones_like(weight) if counted is None else counted.double())
    scores = []
    for ridge in scale * torch.logspace(-4, 1, 16, dtype=torch.float64):
        penalty = torch.diag(torch.cat([ridge.repeat(features.shape[1]), torch.zeros(int(given.intercept))]))
        right = torch.zeros(SAMPLES, dtype=torch.float64)
        for i in range(SAMPLES):
            kept = together != together[i]
            part, pull = design[kept], weight[kept, None] * given.residual[kept]
            solved = torch.linalg.solve(part.T @ (weight[kept, None] * part) + penalty, part.T @ pull)
            right[i] = (given.initial[i] + design[i] @ solved).argmax() == given.target[i].argmax()
        scores.append(float((right * counted).sum() / counted.sum()))
    return scores


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("intercept", [True, False])
def test_it_is_that_of_refits_without_each_sample_in_every_form(form, intercept):
    given = problem(intercept=intercept)
    scores = refitted(given)
    assert len(set(scores)) > 2  # ridges matter here
    assert probe_accuracy(given, kernel(form), "head") == pytest.approx(max(scores), abs=1e-12)


def test_samples_that_are_not_judged_take_part_in_the_fit_all_the_same():
    judged = torch.arange(SAMPLES) % 3 != 0
    expected = max(refitted(problem(), judged))
    assert expected != max(refitted(problem()))
    assert probe_accuracy(problem(), kernel("full"), "head", judged=judged) == pytest.approx(expected, abs=1e-12)


def test_copies_are_left_out_together():
    together = torch.arange(SAMPLES) // 2 * 7  # pairs, whatever their numbers
    features, label = FEATURES[::2].repeat_interleave(2, 0), LABEL[::2].repeat_interleave(2)
    given = problem(label)
    expected = max(refitted(given, together=together, features=features))
    assert expected < max(refitted(given, features=features)) - 0.1  # a copy gives the label away
    got = probe_accuracy(given, kernel("trace", features), "head", together=together)
    assert got == pytest.approx(expected, abs=1e-12)


def test_samples_count_as_much_as_they_weigh():
    weight = 0.2 + normal(SAMPLES, seed=4).square()
    weight[5] = 0.0
    given = problem(weight=weight)
    expected = max(refitted(given))
    assert expected != max(refitted(problem()))
    assert probe_accuracy(given, kernel("trace"), "head") == pytest.approx(expected, abs=1e-12)


def test_the_only_sample_of_its_class_is_not_held_against_the_probe():
    label = LABEL.clone()
    label[label == 2] = 0
    label[3] = 2
    counted = torch.arange(SAMPLES) != 3
    expected = max(refitted(problem(label), counted))
    assert probe_accuracy(problem(label), kernel("full"), "head") == pytest.approx(expected, abs=1e-12)
    label[4], together = 2, torch.arange(SAMPLES)
    together[4] = 3  # two copies of the only image of the class
    counted[4] = False
    expected = max(refitted(problem(label), counted, together))
    got = probe_accuracy(problem(label), kernel("full"), "head", together=together)
    assert got == pytest.approx(expected, abs=1e-12)


def test_the_group_must_be_a_last_layer():
    with pytest.raises(ValueError, match="more than a last layer"):
        probe_accuracy(problem(), kernel("full"), "body")
    with pytest.raises(ValueError, match=r"no group 'neck' but 'body', 'head'.*method\.layers=null"):
        probe_accuracy(problem(), kernel("full"), "neck")


@pytest.mark.parametrize("judged", [torch.ones(3).bool(), torch.ones(SAMPLES)])
def test_what_is_judged_is_one_boolean_by_sample(judged):
    with pytest.raises(ValueError, match="`judged` must be"):
        probe_accuracy(problem(), kernel("trace"), "head", judged=judged)


def test_nothing_to_judge_is_refused():
    with pytest.raises(ValueError, match=r"no sample can be judged.*method\.metric=identity"):
        probe_accuracy(problem(), kernel("trace"), "head", judged=torch.zeros(SAMPLES, dtype=torch.bool))


def test_linear_terms_are_refused():
    with pytest.raises(ValueError, match="linear terms"):
        probe_accuracy(problem(linear=normal(SAMPLES, CLASSES)), kernel("trace"), "head")
