import logging
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from lqf_lightning.analysis import scrub_linear as module
from lqf_lightning.analysis.counted_passes import CountedPasses
from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.analysis.newton_scrub import fit_inverse
from lqf_lightning.analysis.scrub_linear import scrub_linear
from lqf_lightning.analysis.verify_linear import penalized_part, verify_linear
from lqf_lightning.data import Batch
from lqf_lightning.linear import fit_kfac
from methods.dense_lqf import ALPHA, DenseProblem, build, flat, outputs_at_start, penalized, scatter_deltas
from methods.tensors import TensorData, build_trainer, draw
from ranks import run_on_ranks

SAMPLES, MU, EXACT = 11, 0.02, 1e-12
KFAC = partial(fit_kfac, cotangents="random")
COHORT = [1, 4, 9]
ALL = list(range(SAMPLES))
RETAINED = [i for i in range(SAMPLES) if i not in COHORT]
FACTORS = {"stem": 10.0, "head": 0.3}


class Some(TensorData):
    """Some of the samples under their own indices, shared over ranks in turn; the last rank may get none."""

    def __init__(self, kept, rank=0, world=1):
        images, target = draw(SAMPLES)
        super().__init__(images, target, 3)
        cut = {1: [0, len(kept)], 2: [0, 3, len(kept)], 3: [0, 3, len(kept), len(kept)]}[world]
        self.kept, self.own = list(kept), list(kept)[cut[rank] : cut[rank + 1]]

    def fixed_train_dataloader(self):
        images, target = self.splits["train"]
        rows = Subset(TensorDataset(images, target, torch.arange(SAMPLES)), self.kept)
        places = [self.kept.index(sample) for sample in self.own]
        batches = [places[at : at + 3] for at in range(0, len(places), 3)] or [[]]

        def collate(chosen):
            if not chosen:
                return Batch(images[:0], target[:0], torch.zeros(0, dtype=torch.int64))
            return Batch(*default_collate(chosen))

        return DataLoader(rows, batch_sampler=batches, collate_fn=collate)


def attach(method, kept, rank=0, world=1):
    """A method between trainings: with a trainer, and a data module that has these samples alone."""
    trainer = build_trainer(1)
    trainer.datamodule = Some(kept, rank, world)
    method.trainer = trainer
    method._keep = trainer  # referred to weakly
    return method


def dense(kept, method, factors=None, weights=None):
    images, target = draw(SAMPLES)
    names = list(method.linearized.deltas)
    owner = {n: g for g, members in method.backbone.groups.items() for n in members}
    sizes = torch.tensor([method.linearized.deltas[n].numel() for n in names])
    scale = torch.tensor([(factors or {}).get(owner[n], 1.0) for n in names], dtype=torch.float64)
    diagonal = scale.repeat_interleave(sizes) * (penalized(names) if method.intercept_name else 1.0)
    return DenseProblem(images[kept], target[kept], names, len(kept) * method.ridge, torch.diag(diagonal))


def apart(first, second):
    return float((first - second).norm() / second.norm())


OPTIONS = [
    ({}, None),
    ({"group_ridge": FACTORS}, FACTORS),
    ({"preconditioner": KFAC}, None),
    ({"preconditioner": KFAC, "group_ridge": FACTORS}, FACTORS),
    ({"intercept": False}, None),
    ({"layers": ["head"]}, None),
    ({"solver": "cg", "acceleration": "sketch"}, None),
]


@pytest.mark.parametrize("solver", ["newton", "kernel"])
@pytest.mark.parametrize(("options", "factors"), OPTIONS)
@pytest.mark.parametrize("start", ["optimum", "anywhere"])
def test_a_scrub_from_any_weights_is_training_without_the_samples(solver, options, factors, start):
    method = attach(build(ridge=MU, **options), RETAINED)
    before = dense(ALL, method, factors).optimum()
    if start == "anywhere":
        before = scatter_deltas(method)
    write(method, before)
    found = scrub_linear(method, solver=solver, tolerance=EXACT)
    wanted = dense(RETAINED, method, factors).optimum()
    assert apart(flat(found.weights), wanted) < 1e-9
    assert apart(before, wanted) > 1e-3  # there was something to forget
    assert torch.equal(flat(method.linearized.deltas), before)  # which is for the caller to replace
    assert found.name == solver
    assert list(found.weights) == list(method.trained())


def write(method, vector):
    parts = vector.split([delta.numel() for delta in method.linearized.deltas.values()])
    with torch.no_grad():
        for delta, part in zip(method.linearized.deltas.values(), parts, strict=True):
            delta.copy_(part.view(delta.shape))


def scrubbed_flat(method, kept, solver="newton"):
    found = scrub_linear(attach(method, kept), solver=solver, tolerance=1e-9)
    write(method, flat(found.weights))
    return flat(found.weights)


def test_forgetting_nothing_leaves_the_optimum_and_a_second_scrub_changes_nothing():
    method = build(ridge=MU)
    optimum = dense(ALL, method).optimum()
    write(method, optimum)
    found = scrub_linear(attach(method, ALL), solver="newton", tolerance=1e-9)
    assert found.steps == 0
    assert apart(flat(found.weights), optimum) < 1e-12
    once = scrubbed_flat(method, RETAINED)
    again = scrub_linear(method, solver="newton", tolerance=1e-9)
    assert again.steps == 0
    assert apart(flat(again.weights), once) < 1e-12


@pytest.mark.parametrize("solver", ["newton", "kernel"])
def test_requests_one_by_one_in_any_order_are_one_joint_request(solver):
    layers, results = (["head"] if solver == "newton" else None), []
    for order in (COHORT, COHORT[::-1]):
        method, kept = build(ridge=MU, layers=layers), list(range(SAMPLES))
        write(method, dense(kept, method).optimum())
        for sample in order:
            kept.remove(sample)
            result = scrubbed_flat(method, kept, solver)
        results.append(result)
    joint = build(ridge=MU, layers=layers)
    write(joint, dense(ALL, joint).optimum())
    joint = scrubbed_flat(joint, RETAINED, solver)
    assert all(apart(result, joint) < 1e-6 for result in results)  # their certificates add up


@pytest.mark.parametrize("intercept", [True, False])
def test_certificates_bound_the_true_distances(intercept):
    method = attach(build(ridge=MU, intercept=intercept, group_ridge=FACTORS), RETAINED)
    scatter_deltas(method)
    problem = dense(RETAINED, method, FACTORS)
    optimum, zero = problem.optimum(), torch.zeros(len(problem.hessian), dtype=torch.float64)
    for steps in (1, 3):
        found = scrub_linear(method, solver="newton", tolerance=EXACT, max_steps=steps, certify_intercept=True)
        dw, certificate = flat(found.weights), found.certificate
        gradient = problem.gradient_length(dw)
        assert certificate.distance_bound == pytest.approx(gradient / problem.ridge, rel=1e-8)
        assert certificate.relative_gradient == pytest.approx(gradient / problem.gradient_length(zero), rel=1e-8)
        assert certificate.objective == pytest.approx(problem.objective(dw), rel=1e-9)
        assert 0 < problem.length(dw - optimum) <= certificate.distance_bound
        free = problem.free
        assert float((dw - optimum)[free].norm()) <= found.intercept_bound
        if intercept:
            mean = problem.rows.mean(0)[:, ~free] / problem.metric.diagonal()[~free].sqrt()
            norm = torch.linalg.matrix_norm(mean, 2)
            assert found.intercept_bound == pytest.approx(float(norm) * certificate.distance_bound, rel=1e-6)
    exact = scrub_linear(method, solver="kernel", tolerance=1e-8)
    assert (0.0 < exact.intercept_bound < 1e-9) if intercept else exact.intercept_bound == 0.0
    unasked = scrub_linear(method, solver="newton", tolerance=1e-1)
    assert unasked.intercept_bound == (None if intercept else 0.0)


@pytest.mark.parametrize("solver", ["newton", "kernel"])
def test_sample_weights_count(solver):
    method = attach(build(ridge=MU), RETAINED)
    method.sample_weights = torch.linspace(0.0, 3.0, SAMPLES, dtype=torch.float64)
    scatter_deltas(method)
    found = flat(scrub_linear(method, solver=solver, tolerance=EXACT).weights)
    problem = dense(RETAINED, method)
    weight = method.sample_weights[RETAINED]
    hessian = torch.einsum("i,icp,icq->pq", weight, problem.rows, problem.rows) + problem.ridge * problem.metric
    target = ALPHA * torch.eye(3, dtype=torch.float64)[draw(SAMPLES)[1][RETAINED]]
    error = outputs_at_start(draw(SAMPLES)[0][RETAINED]) - target
    wanted = torch.linalg.solve(hessian, -torch.einsum("i,icp,ic->p", weight, problem.rows, error))
    assert apart(found, wanted) < 1e-9
    assert apart(wanted, problem.optimum()) > 1e-2


def test_at_the_optimum_the_gradients_of_both_parts_cancel_and_verification_sees_it():
    method = attach(build(ridge=MU, intercept=False), RETAINED)
    optimum = dense(ALL, method).optimum()
    write(method, optimum)
    # Each part in its mean form with its own penalty: n_r g_r + n_f g_f = 0 (sum forms here).
    lengths = []
    for kept in (RETAINED, COHORT):
        lengths.append(verify_linear(attach(method, kept), dict(method.trained())).distance_bound * len(kept) * MU)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-9)
    assert lengths[0] > 1e-3


def test_a_wrong_normalization_verifies_badly():
    method = attach(build(ridge=MU), RETAINED)
    write(method, dense(ALL, method).optimum())
    right = scrub_linear(method, solver="newton", tolerance=1e-9).weights
    # A Hessian of the sum form on a gradient of the mean form goes 1/n_r of the way.
    before = {name: delta.detach() for name, delta in method.trained().items()}
    wrong = {name: before[name] + (entry - before[name]) / len(RETAINED) for name, entry in right.items()}
    good, bad, old = (verify_linear(method, weights) for weights in (right, wrong, before))
    assert good.relative_gradient <= 1e-9
    assert good.intercept_gap < 1e-12
    assert bad.relative_gradient > 0.8 * old.relative_gradient > 1e-3
    stale = verify_linear(method, right | {"fc.bias": before["fc.bias"]})
    assert stale.intercept_gap == pytest.approx(float((before["fc.bias"] - right["fc.bias"]).norm()), rel=1e-6)


def test_a_distance_alone_spares_the_gradient_at_the_pre_trained_weights():
    method = attach(build(ridge=MU), RETAINED)
    write(method, dense(ALL, method).optimum())
    first = scrub_linear(method, solver="newton", tolerance=1e-2)
    limit = first.certificate.distance_bound
    second = scrub_linear(method, solver="newton", distance=1.01 * limit)
    assert second.steps == first.steps
    assert math.isnan(second.certificate.relative_gradient)
    assert second.certificate.distance_bound == pytest.approx(limit, rel=1e-9)
    assert second.passes == pytest.approx(first.passes - 2 / 5)
    both = scrub_linear(method, solver="newton", tolerance=1e-2, distance=limit / 100)
    assert both.certificate.relative_gradient <= 1e-2
    assert both.certificate.distance_bound <= limit / 100
    assert both.steps > first.steps


def test_work_is_counted_as_it_is_done(monkeypatch):
    from lqf_lightning.analysis import counted_passes

    done = []
    for name, units in (("PushSweep", lambda *_: 3), ("PullSweep", lambda _, *sides: 1 + 2 * len(sides))):
        kind = getattr(counted_passes, name)
        monkeypatch.setattr(
            counted_passes, name, lambda *given, kind=kind, units=units: done.append(units(*given)) or kind(*given)
        )
    for options, first in (({}, 3), ({"from_zero": True}, 1)):
        for solver in ("newton", "kernel"):
            method = attach(build(ridge=MU), RETAINED)
            scatter_deltas(method)
            done.clear()
            found = scrub_linear(method, solver=solver, tolerance=1e-6, certify_intercept=True, **options)
            extra = 1 + 1 + 3 if solver == "kernel" else first  # outputs; evaluation and three backward passes
            assert 5 * found.passes == pytest.approx(sum(done) + extra)
            assert found.curve[-1]["passes"] <= found.passes
            assert found.curve[-1]["distance_bound"] == found.certificate.distance_bound


def test_from_zero_is_the_cold_retraining_and_a_warm_start_is_cheaper():
    method = attach(build(ridge=MU), [i for i in range(SAMPLES) if i != 4])
    write(method, dense(ALL, method).optimum())
    warm = scrub_linear(method, solver="newton", distance=1e-3)
    cold = scrub_linear(method, solver="newton", distance=1e-3, from_zero=True)
    assert (flat(warm.weights) - flat(cold.weights)).norm() < 1e-2  # two distances and intercepts
    assert warm.curve[0]["distance_bound"] < 0.5 * cold.curve[0]["distance_bound"]
    assert warm.steps <= cold.steps


def plain_gradients(method, tolerance):
    """Relative gradients of conjugate gradients without combination, to the first that is small enough."""
    movement = penalized_part(method, method.trained())
    with torch.no_grad():
        passes = CountedPasses(method, movement)
        inverse = fit_inverse(method, passes)
        descent = passes.measure(movement, passes.image, reference=None, precondition=inverse)
        found = [descent.certificate.relative_gradient]
        while found[-1] > tolerance:
            descent.receive_image(passes.push(descent.direction))
            descent.receive_gradient(passes.pull(descent.residual)[0])
            found.append(descent.certificate.relative_gradient)
    return found


@pytest.mark.parametrize("options", [{}, {"preconditioner": KFAC, "group_ridge": FACTORS}])
def test_no_step_more_than_conjugate_gradients_and_a_bound_that_never_rises(options):
    method = attach(build(ridge=MU / 10, **options), RETAINED)
    write(method, dense(ALL, method).optimum())
    plain, saved = plain_gradients(method, 1e-4), 0
    assert any(later > earlier for earlier, later in pairwise(plain))  # which is why they are combined
    for peak in [entry for entry in plain if entry > 1e-4][1::2]:
        tolerance = 0.9 * peak
        found = scrub_linear(method, solver="newton", tolerance=tolerance)
        steps = next(number for number, entry in enumerate(plain) if entry <= tolerance)
        assert found.steps <= steps
        saved += steps - found.steps
        bounds = [row["distance_bound"] for row in found.curve]
        assert len(bounds) == found.steps + 1
        assert all(later <= earlier for earlier, later in pairwise(bounds))
        checked = verify_linear(method, found.weights)
        assert checked.relative_gradient <= tolerance
        assert checked.distance_bound == pytest.approx(bounds[-1], rel=1e-9)
    assert saved > 0


def test_rounding_ends_a_scrub_with_a_certificate_of_the_stored_weights(caplog):
    caplog.set_level(logging.WARNING, "lqf_lightning")
    method = build(ridge=MU)
    method = attach(method.float(), RETAINED)
    data = method.trainer.datamodule
    data.splits["train"] = (data.splits["train"][0].float(), data.splits["train"][1])
    scatter_deltas(method)
    found = scrub_linear(method, solver="newton", tolerance=1e-12, max_steps=60)
    assert found.steps < 60
    assert any("rounding allows no better" in message for message in caplog.messages)
    assert all(entry.dtype == torch.float32 for entry in found.weights.values())
    assert found.certificate.relative_gradient < 1e-4
    again = verify_linear(method, found.weights)
    assert again.distance_bound == pytest.approx(found.certificate.distance_bound, rel=1e-3)
    exact = build(ridge=MU)
    problem = dense(RETAINED, exact)
    distance = problem.length(flat(found.weights).double() - problem.optimum())
    assert distance < 1.1 * found.certificate.distance_bound + 1e-4 * problem.length(problem.optimum())


def test_the_kept_kernel_of_another_model_is_found_out_and_made_up_for(caplog):
    method = attach(build(ridge=MU), RETAINED)
    scatter_deltas(method)
    rows = 3 * SAMPLES
    draws = torch.randn(rows, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = KeptKernel({"ridge x 1": (draws @ draws.T)[None]}, 3, torch.arange(SAMPLES))
    found = scrub_linear(method, kernel=other, tolerance=1e-10)
    assert any("that of another model" in message for message in caplog.messages)
    assert found.certificate.relative_gradient <= 1e-10
    assert apart(flat(found.weights), dense(RETAINED, method).optimum()) < 1e-7


def test_auto_takes_the_kernel_of_a_small_set_only(monkeypatch):
    method = attach(build(ridge=MU), RETAINED)
    assert scrub_linear(method, tolerance=1e-6).name == "kernel"
    monkeypatch.setattr(module, "ASSEMBLED", 3 * len(RETAINED) - 1)
    assert scrub_linear(method, tolerance=1e-6).name == "newton"


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("solver", ["newton", "kernel"])
def test_any_number_of_ranks_gives_the_same(world, solver):
    def work(world):
        method = attach(build(ridge=MU), RETAINED, torch.distributed.get_rank(), world)
        scatter_deltas(method)
        found = scrub_linear(method, solver=solver, tolerance=1e-9, max_steps=4, certify_intercept=True)
        checked = verify_linear(method, found.weights)
        return flat(found.weights), found.certificate, found.intercept_bound, found.passes, checked

    (one,) = run_on_ranks(1, work, 1)
    results = run_on_ranks(world, work, world)
    for weights, certificate, bound, passes, checked in results:
        assert torch.equal(weights, results[0][0])
        assert apart(weights, one[0]) < 1e-10
        assert certificate == results[0][1]
        assert certificate.objective == pytest.approx(one[1].objective, rel=1e-10)
        assert passes == one[3]
        assert checked.distance_bound == pytest.approx(certificate.distance_bound, rel=1e-6, abs=1e-9)
        assert bound == results[0][2]
        if solver == "newton":  # a few steps: far from rounding
            assert certificate.distance_bound == pytest.approx(one[1].distance_bound, rel=1e-8)
            assert bound == pytest.approx(one[2], rel=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "cross_entropy"}, r"method\.loss=squared"),
        ({"ridge": 0.0}, r"Train with method\.ridge=1e-3"),
        ({"ridge": "auto"}, r"open a trained checkpoint"),
        ({"solver": "cg", "metric": "kfac", "preconditioner": KFAC}, r"method\.metric=identity"),
    ],
)
def test_methods_without_a_certified_optimum_are_refused(options, message):
    method = attach(build(**{"ridge": MU} | options), RETAINED)
    with pytest.raises(ValueError, match=message):
        scrub_linear(method)
    with pytest.raises(ValueError, match=message):
        verify_linear(method, dict(method.trained()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "cholesky"}, "Set solver=auto"),
        ({"tolerance": 0.0}, "positive tolerance"),
        ({"distance": math.inf}, "positive tolerance"),
    ],
)
def test_wrong_options_say_what_is_expected(options, message):
    with pytest.raises(ValueError, match=message):
        scrub_linear(attach(build(ridge=MU), RETAINED), **options)


def test_no_sample_left_and_broken_weights_are_refused():
    method = attach(build(ridge=MU), [])
    with pytest.raises(ValueError, match="no training sample is left"):
        scrub_linear(method, solver="newton")
    method = attach(method, RETAINED)
    weights = {name: delta.detach().clone() for name, delta in method.trained().items()}
    with pytest.raises(ValueError, match=r"'fc\.bias' is missing"):
        verify_linear(method, {name: entry for name, entry in weights.items() if name != "fc.bias"})
    weights["fc.weight"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'fc\.weight' holds values that are not finite"):
        verify_linear(method, weights)


def test_a_chosen_ridge_is_kept(caplog):
    caplog.set_level(logging.INFO, "lqf_lightning")
    method = attach(build(ridge="auto", solver="kernel"), RETAINED)
    method.ridge = MU
    found = scrub_linear(method, tolerance=EXACT)
    assert any("ridge=0.02 is kept" in message for message in caplog.messages)
    assert apart(flat(found.weights), dense(RETAINED, method).optimum()) < 1e-9


@pytest.mark.parametrize("solver", ["newton", "kernel"])
def test_factors_that_were_learned_are_kept_and_said_to_be(solver, caplog):
    caplog.set_level(logging.INFO, "lqf_lightning")
    method = attach(build(solver="kernel", ridge="auto", metric="learned"), RETAINED)
    method.ridge, method.group_ridge = MU, dict(FACTORS)
    found = scrub_linear(method, solver=solver, tolerance=EXACT)
    assert apart(flat(found.weights), dense(RETAINED, method, FACTORS).optimum()) < 1e-9
    assert any("with its factors by layer group is kept" in text for text in caplog.messages)
