import pytest
import torch
from torch.nn.functional import one_hot

from analysis.sharded_data import COHORT, RIDGE, attached, make_data, optimum, retained
from lqf_lightning.analysis.relearn import Relearning, RelearnOptions
from lqf_lightning.analysis.relearning_set import load_relearning_set
from lqf_lightning.analysis.with_weights import trained_weights, with_weights
from lqf_lightning.methods import Finetune
from methods.dense_lqf import ALPHA, build, flat, jacobian, outputs_at_start, penalized
from methods.tensors import CLASSES, SGD, build_backbone, draw
from ranks import run_on_ranks

IMAGES, LABEL = draw(24, 1)
ALL = {"samples": 24, "batch_size": 24, "max_steps": 400}


@pytest.fixture(scope="module")
def weights():
    return {"original": optimum(), "retrained": optimum(retained())}


def relearn(weights, look, method=None, **options):
    """What `look` finds of a relearning whose threshold comes from the original weights."""

    def inside(method):
        with with_weights(method, weights.get("original")):
            relearning = Relearning(method, make_data(), COHORT, retained(), RelearnOptions(**options))
        return look(relearning)

    return attached(inside, method)


class Dense:
    """Gradient descent on the mean loss over all samples, with the dense Jacobian."""

    def __init__(self, names):
        self.rows, self.start = jacobian(IMAGES, names), outputs_at_start(IMAGES)
        self.target, self.metric = ALPHA * one_hot(LABEL, 3), penalized(names)

    def outputs(self, dw):
        return self.start + self.rows @ dw

    def curvature(self, chosen):
        rows = self.rows[chosen].flatten(0, 1)
        hessian = rows.T @ rows / len(chosen) + RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
        return float(torch.linalg.eigvalsh(hessian)[-1])

    def cohort_loss(self, dw):
        return float(0.5 * (self.outputs(dw) - self.target)[COHORT].square().sum(1).mean())

    def steps(self, dw, rate, threshold):
        for step in range(400):
            if self.cohort_loss(dw) <= threshold:
                return step
            pull = torch.einsum("icp,ic->p", self.rows, self.outputs(dw) - self.target) / 24
            dw = dw - rate * (pull + RIDGE * self.metric * dw)
        return None


@pytest.mark.parametrize("rate", [None, 0.15])
def test_steps_are_those_of_plain_gradient_descent(weights, rate):
    found = relearn(
        weights,
        lambda r: (r.steps(weights["retrained"]), r.learning_rate, r.threshold),
        learning_rate=rate, tolerance=0.5, **ALL,
    )  # fmt: skip
    dense = Dense(list(weights["original"]))
    threshold = 1.5 * dense.cohort_loss(flat(weights["original"]))
    assert found[2] == pytest.approx(threshold, rel=1e-7)
    assert found[0] == dense.steps(flat(weights["retrained"]), found[1], found[2])
    assert found[0] > 3


def test_the_rate_is_one_over_the_largest_curvature_of_the_batches(weights):
    rate = relearn(weights, lambda r: r.learning_rate, **ALL)
    top = Dense(list(weights["original"])).curvature(torch.arange(24))
    # The power iteration approaches from below, and the intercept carries no penalty.
    assert top * 0.8 < 1 / rate <= top * (1 + 1e-6)


def test_the_original_model_needs_no_step_and_one_without_the_cohort_does(weights):
    names = ("original", "retrained", "retrained")
    found = relearn(weights, lambda r: [r.steps(weights[n]) for n in names], tolerance=0.5, batch_size=8, samples=24)
    assert found[0] == 0
    assert found[1] > 0
    assert found[1] == found[2]


def test_the_method_has_its_own_weights_back(weights):
    def look(relearning):
        before = trained_weights(relearning.method)
        relearning.steps(weights["retrained"])
        return before, trained_weights(relearning.method)

    before, after = relearn(weights, look, batch_size=8, samples=24, max_steps=5)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_is_given_up_after_so_many_steps_and_where_it_diverges(weights):
    start = weights["retrained"]
    assert relearn(weights, lambda r: r.steps(start), tolerance=0.0, max_steps=3, samples=12) is None
    assert relearn(weights, lambda r: r.steps(start), learning_rate=1e9, max_steps=20) is None


def test_accuracy_may_be_what_has_to_come_back(weights):
    options = {"measure": "accuracy", "tolerance": 0.4, **ALL}
    steps, threshold = relearn(weights, lambda r: (r.steps(weights["retrained"]), r.threshold), **options)
    dense, original = Dense(list(weights["original"])), flat(weights["original"])
    right = (dense.outputs(original).argmax(1) == LABEL)[COHORT].double().mean().item()
    assert threshold == pytest.approx(0.6 * right, rel=1e-12)
    assert steps > 0


def test_networks_relearn_too_and_keep_their_statistics():
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)

    def look(method):
        relearning = Relearning(method, make_data(), COHORT, retained(), RelearnOptions(samples=24, tolerance=0.0))
        relearning.threshold *= 0.97
        before = {name: value.clone() for name, value in method.state_dict().items()}
        steps = relearning.steps(None)
        after = method.state_dict()
        return steps, relearning.learning_rate, all(torch.equal(after[name], before[name]) for name in before)

    steps, rate, unchanged = attached(look, method)
    assert steps > 0
    assert rate == 0.01
    assert unchanged


@pytest.mark.filterwarnings("ignore:.*sync_dist=True.*")  # the group of the test is not one of the trainer's
def test_steps_are_the_same_on_any_number_of_ranks(weights):
    def rank():
        look = lambda r: {"steps": r.steps(weights["retrained"]), "rate": r.learning_rate, "at": r.threshold}  # noqa: E731  # used on two lines
        return relearn(weights, look, tolerance=1.0, batch_size=5, samples=10)

    alone = rank()
    assert alone["steps"] > 0
    for found in [*run_on_ranks(2, rank), *run_on_ranks(3, rank)]:
        assert found["steps"] == alone["steps"]
        assert found["rate"] == pytest.approx(alone["rate"], rel=1e-9)
        assert found["at"] == pytest.approx(alone["at"], rel=1e-9)


def test_a_large_cohort_takes_half_of_the_samples(weights):
    def look(method):
        return load_relearning_set(method, make_data(), COHORT, retained(), 8, 0)

    found = attached(look)
    assert len(found.members) == 4
    assert torch.isin(found.members, COHORT).all()
    assert torch.isin(found.index, torch.cat([found.members, retained()])).all()
    assert len(found.index.unique()) == 8
    assert found.cohort == 6
    assert torch.equal(found.own.input, IMAGES[found.index])


def test_the_description_says_what_the_number_depends_on(weights):
    found = relearn(weights, lambda r: r.describe(), samples=8, batch_size=3)
    assert found["learning_rate"] > 0
    assert "loss of the cohort <= " in found["threshold"]
    assert "within 5%" in found["threshold"]
    assert "4 of 6 samples of the cohort and 4 retained" in found["sampling"]
    assert "3 per step" in found["sampling"]


def test_a_retained_cohort_is_refused():
    with pytest.raises(ValueError, match="6 samples of the cohort are among"):
        attached(lambda m: Relearning(m, make_data(), COHORT, torch.arange(24)), build(ridge=RIDGE, solver="kernel"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"measure": "f1"}, "measure=loss"), ({"tolerance": -0.1}, r"tolerance=0\.05"),
        ({"samples": 1}, "samples=256"), ({"learning_rate": 0.0}, r"learning_rate=0\.01"),
    ],
)  # fmt: skip
def test_odd_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        RelearnOptions(**options)
