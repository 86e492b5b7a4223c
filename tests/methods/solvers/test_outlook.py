import math

import pytest
import torch

from lqf_lightning.linear import Kernel, QuadraticProblem
from lqf_lightning.methods.solvers.outlook import EARLY, early_share, judge, outlook
from lqf_lightning.methods.solvers.probe_accuracy import probe_accuracy

CLASSES, SAMPLES = 3, 24
FEATURES = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HEAD = torch.kron(FEATURES @ FEATURES.T, torch.eye(CLASSES, dtype=torch.float64))
FULL = Kernel({"body": HEAD[None], "head": HEAD[None]}, CLASSES)
TRACE = Kernel({"body": HEAD[None, ::CLASSES, ::CLASSES], "head": HEAD[None, ::CLASSES, ::CLASSES]}, CLASSES, "trace")
SHARE = {"stem": EARLY, "neck": 0.1, "stage1": 0.1, "head": 0.3 - 1e-9}
HARD = {"judged": FEATURES[:, 3] < 0, "together": FEATURES[:, :CLASSES].argmin(1)}


@pytest.fixture
def problem():
    label = FEATURES[:, :CLASSES].argmax(1)
    target = torch.nn.functional.one_hot(label, CLASSES).double()
    return QuadraticProblem(torch.zeros_like(target), target, 1.0, intercept=True)


# Leave-one-out accuracies of probe and LQF, images per class, and the share of early layers where it is known.
@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((0.748, 0.753, 64, 0.07), "linear"),  # textures
        ((0.616, 0.636, 64, 0.02), "linear"),  # CIFAR-10
        ((0.922, 0.950, 50, 0.76), "linear"),  # digits
        ((0.232, 0.251, 20, 0.12), "either"),  # cars, of 64 pixels
        ((0.37, 0.44, 20, 0.12), "nonlinear"),  # cars, of 112 pixels
        ((0.528, 0.570, 18, 0.36), "nonlinear"),  # traffic signs
        ((0.528, 0.570, 18), "linear"),  # the same without a learned penalty
        ((0.528, 0.540, 18, 0.36), "linear"),  # early layers that bring nothing
        ((0.37, 0.44, 5, 0.6), "linear"),  # few shots
        ((0.70, 0.80, 50, 0.02), "either"),  # features move, and less is left
        ((1.00, 0.40, 50, 0.6), "either"),
        ((1.00, 1.00, 50, 0.6), "linear"),
    ],
)
def test_the_rule_agrees_with_the_sets_that_it_rests_on(figures, expected):
    assert judge(*figures)[0] == expected


def test_early_layers_are_the_first_two_thirds_of_the_body():
    share = {"stem": 1.0, "a": 2.0, "b": 4.0, "c": 8.0, "d": 16.0, "neck": 32.0, "head": 64.0}
    assert early_share(share, "head") == pytest.approx(15 / 127)
    assert math.isnan(early_share({"head": 1.0}, "head"))


def test_words_hold_the_figures_what_they_rest_on_and_what_to_type(problem):
    for exact, named in ((None, "exact"), (False, "surrogate")):
        found = outlook(problem, FULL, "head", 0.69, exact=exact, samples_per_class=20, share=SHARE, **HARD)
        assert (found.verdict, found.linear, found.exact) == ("nonlinear", 0.69, exact is None)
        for part in (f"probe {found.probe:.3f}", "LQF 0.690", named, "five image sets", "method=finetune",
                     "backbone.weights=CORE/checkpoints/last.ckpt"):  # fmt: skip
            assert part in found.words


def test_a_trace_kernel_is_a_surrogate_of_lqf_and_exact_for_the_probe(problem):
    exact, surrogate = (outlook(problem, kernel, "head", 0.9) for kernel in (FULL, TRACE))
    assert (exact.exact, surrogate.exact) == (True, False)
    assert exact.probe == surrogate.probe == probe_accuracy(problem, FULL, "head")


def test_the_probe_is_judged_as_lqf_was(problem):
    expected = probe_accuracy(problem, TRACE, "head", **HARD)
    assert expected not in [probe_accuracy(problem, TRACE, "head", **{k: v}) for k, v in HARD.items()]
    assert outlook(problem, TRACE, "head", 0.9, **HARD).probe == expected


def test_few_images_per_class_are_told(problem):
    found = outlook(problem, FULL, "head", 0.25, share=SHARE)
    assert (found.verdict, "8 images per class" in found.words) == ("linear", True)


@pytest.mark.parametrize("linear", [math.nan, -0.1, 1.1])
def test_an_accuracy_that_is_none_is_refused(linear, problem):
    with pytest.raises(ValueError, match="between 0 and 1"):
        outlook(problem, TRACE, "head", linear)
