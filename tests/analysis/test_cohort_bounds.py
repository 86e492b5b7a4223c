from dataclasses import replace

import pytest
import torch
from lightning import Callback
from torch.func import functional_call, jacrev

from lqf_lightning.analysis.cohort_bounds import cohort_bounds
from lqf_lightning.analysis.cohort_optima import NOTHING
from lqf_lightning.analysis.query_set import spread_evenly
from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.folder_source import FolderSource
from lqf_lightning.forgetting.gaussian_information import query_information
from lqf_lightning.methods import LQF
from methods.dense_lqf import ALPHA, SGD, DenseProblem, flat, penalized, scatter_deltas
from methods.tensors import build_backbone, build_trainer, fit_on

MU, SIGMA = 0.02, 0.1
COHORTS = {"few": torch.tensor([3, 9, 14]), "greens": torch.arange(8, 16)}


def build_data(root):
    data = ImageDataModule(FolderSource(root), image_size=6, batch_size=5, num_workers=0)
    data.normalization = ((0.5,) * 3, (0.5,) * 3)
    return data


def build_method(**options):
    options = {"optimizer": SGD, "target_scale": ALPHA, "ridge": MU, "normalize_step": False, **options}
    return LQF(build_backbone(), ["blue", "green", "red"], **options)


class Prepare(Callback):
    """Prepares the bounds when training starts, and moves the weights somewhere."""

    def on_train_start(self, trainer, pl_module):
        self.bounds = cohort_bounds(pl_module, COHORTS, sigma=SIGMA, queries=4, tolerance=1e-3)
        self.start = self.bounds.now()
        self.weights = scatter_deltas(pl_module)
        self.moved = self.bounds.now()


def stack(loader):
    batches = list(loader)
    return torch.cat([b.input for b in batches]).double(), torch.cat([b.target for b in batches])


class Reference:
    """The same problem in dense matrices, with the images that the loaders give."""

    def __init__(self, data, method, **factors):
        self.names = list(method.linearized.deltas)
        self.train, self.val = stack(data.fixed_train_dataloader()), stack(data.val_dataloader())
        sizes = dict(build_backbone().model.named_parameters())
        groups = build_backbone().groups
        scale = {name: factors.get(group, 1.0) for group, names in groups.items() for name in names}
        weights = torch.cat([torch.full((sizes[n].numel(),), scale[n]).double() for n in self.names])
        self.metric = torch.diag(weights * penalized(self.names))

    def optimum(self, removed=()):
        images, target = self.train
        keep = [i for i in range(len(target)) if i not in removed]
        ridge = MU * len(keep)
        return DenseProblem(images[keep], target[keep], self.names, ridge, self.metric).optimum()

    def rows(self, images):
        model = build_backbone().model
        weights = {name: p.detach() for name, p in model.named_parameters()}
        blocks = jacrev(lambda own: functional_call(model, weights | own, (images,)))({
            n: weights[n] for n in self.names
        })
        return torch.cat([blocks[name].flatten(2) for name in self.names], 2)


def prepare(root, **options):
    data, method, callback = build_data(root), build_method(**options), Prepare()
    fit_on(build_trainer(1, callback, precision="64-true", limit_train_batches=1), method, data)
    return callback, Reference(data, method, **(options.get("group_ridge") or {}))


@pytest.fixture(scope="module", params=[{}, {"group_ridge": {"stem": 5.0, "head": 0.5}}, {"intercept": False}], ids=str)
def prepared(request, folder_of_shapes):
    return prepare(folder_of_shapes, **request.param)


def change(prepared, name):
    callback, reference = prepared
    removed = COHORTS[name].tolist() if name in COHORTS else ()
    expected = reference.optimum(removed) if callback.bounds.method.intercept_name else None
    got = flat(callback.bounds.optima[name].weights)
    return callback.weights - got, got, expected


def test_the_optimum_without_a_cohort_is_that_of_training_on_the_others(prepared):
    for name in (NOTHING, *COHORTS):
        _, got, expected = change(prepared, name)
        if expected is None:  # a bias that is penalized like other weights
            continue
        assert (got - expected).norm() < 1e-7 * expected.norm()
        proof = prepared[0].bounds.optima[name].certificate
        assert proof.relative_gradient < 1e-6


def test_cohorts_whose_optimum_is_known_worse_than_they_move_it_are_named(prepared):
    bounds = prepared[0].bounds
    assert bounds.rough() == {}
    name = next(iter(COHORTS))
    certificate = replace(bounds.optima[name].certificate, distance_bound=100.0)
    optima = {**bounds.optima, name: replace(bounds.optima[name], certificate=certificate)}
    assert replace(bounds, optima=optima).rough() == {name: 100.0}


def test_nats_of_weights_are_half_the_squared_distance_over_the_noise(prepared):
    callback, _ = prepared
    for name in (NOTHING, *COHORTS):
        moved, optimum, _ = change(prepared, name)
        numbers = callback.moved[name]
        assert numbers["weights_nats"] == pytest.approx(float(moved @ moved) / 2 / SIGMA**2, rel=1e-12)
        own = callback.bounds.method.intercept_name
        bias = moved[-3:].square().sum() if own else 0.0
        assert numbers["intercept_nats"] == pytest.approx(float(bias) / 2 / SIGMA**2, rel=1e-12)
        share = max(0.0, min(1.0, float(callback.weights @ optimum / (optimum @ optimum))))
        least = float((callback.weights - share * optimum).square().sum()) / 2 / SIGMA**2
        assert numbers["least_nats"] == pytest.approx(least, rel=1e-9)
        assert callback.start[name]["least_nats"] == 0


def test_nats_of_answers_are_those_of_a_noisy_linear_model(prepared):
    callback, reference = prepared
    queries = {None: reference.val[0][spread_evenly(torch.arange(11), 4, 3)]}
    for name in COHORTS:
        queries[name] = reference.train[0][spread_evenly(COHORTS[name], 4, 3)]
    for name in COHORTS:
        moved, _, _ = change(prepared, name)
        for images, column in ((queries[None], "outputs_nats"), (queries[name], "cohort_outputs_nats")):
            rows = reference.rows(images).flatten(0, 1)
            expected = query_information(rows @ moved, SIGMA**2 * rows @ rows.T)
            got = callback.moved[name][column]
            assert got == pytest.approx(expected, rel=1e-5)  # the smallest eigenvalues of the kernel are small
            assert 0 < got <= callback.moved[name]["weights_nats"]
    assert callback.moved[NOTHING]["cohort_outputs_nats"] is None


def test_the_cost_is_the_difference_on_the_validation_set(prepared):
    callback, reference = prepared
    if callback.bounds.method.intercept_name is None:
        pytest.skip("the dense reference has a free bias")
    images, target = reference.val
    start, rows, accuracy = build_backbone().model(images).detach(), reference.rows(images), {}
    for name in (NOTHING, *COHORTS):
        outputs = start + rows @ change(prepared, name)[2]
        accuracy[name] = float((outputs.argmax(1) == target).double().mean())
        wanted = ALPHA * torch.nn.functional.one_hot(target, 3)
        loss = float(0.5 * (outputs - wanted).square().sum(1).mean())
        cost = callback.bounds.costs[name]
        assert cost["accuracy"] == pytest.approx(accuracy[name])
        assert cost["accuracy_cost"] == pytest.approx(accuracy[NOTHING] - accuracy[name])
        assert cost["loss"] == pytest.approx(loss, rel=1e-6)
    assert callback.bounds.costs["greens"]["accuracy_cost"] > 0  # nothing else teaches the class


def test_a_finished_model_holds_the_distance_between_the_optima(prepared):
    callback, _ = prepared
    finished, whole = callback.bounds.at_optimum(), flat(callback.bounds.optima[NOTHING].weights)
    for name in COHORTS:
        _, optimum, _ = change(prepared, name)
        expected = float((whole - optimum).square().sum()) / 2 / SIGMA**2
        assert finished[name]["weights_nats"] == pytest.approx(expected, rel=1e-12)
    assert finished[NOTHING]["weights_nats"] == 0


def test_many_queries_lie_evenly_among_the_samples():
    assert spread_evenly(torch.arange(100), 5, 10).tolist() == [0, 25, 50, 74, 99]
    assert len(spread_evenly(torch.arange(100), 50, 1000)) == 4  # 4,000 answers
    assert spread_evenly(torch.tensor([7]), 5, 10).tolist() == [7]
