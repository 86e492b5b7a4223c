import itertools
import logging
import math
from functools import partial

import pandas as pd
import pytest
import torch
from lightning import Callback
from torch import nn
from torch.nn.functional import one_hot

from lqf_lightning.linear import fit_kfac
from lqf_lightning.methods.losses import scaled_squared_loss
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, StoredPredictions
from methods.dense_lqf import ALPHA, build, flat, jacobian, outputs_at_start
from methods.matched_lqf import SAMPLES, VIEW, DenseMatching, build_teacher
from methods.solvers.runs import Note, dense, solve
from methods.tensors import CLASSES, TensorData, build_trainer, draw, fit_on

IMAGES, LABEL = draw(SAMPLES)
KFAC = partial(fit_kfac, cotangents="exact")
KERNEL = {"solver": "kernel", "ridge": 0.02}
CG = {"solver": "cg", "ridge": 0.02, "tolerance": 1e-12}
TARGET = ALPHA * one_hot(LABEL, 3).double()


def matched(teacher, alpha, beta, scale="auto"):
    """F and z of a reference of the same classes, by brute force."""
    raw = teacher(IMAGES)
    focus = alpha + beta * (raw.argmax(1) == LABEL).double()
    if scale != "auto":
        return focus, scale * raw
    columns = torch.stack([(raw - raw.mean(1, keepdim=True)).flatten(), torch.ones(33, dtype=torch.float64)], 1)
    (factor, level) = torch.linalg.lstsq(columns, TARGET.flatten()).solution
    assert float(level) == pytest.approx(ALPHA / 3, rel=1e-12)
    return focus, (columns @ torch.stack([factor, level])).view(SAMPLES, 3)


class Path(Callback):
    """dw after each epoch."""

    def __init__(self):
        self.deltas = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.deltas.append(flat(pl_module.linearized.deltas).clone())


def place(method, dw):
    with torch.no_grad():
        parts = dw.split([delta.numel() for delta in method.linearized.deltas.values()])
        for delta, part in zip(method.linearized.deltas.values(), parts, strict=True):
            delta.copy_(part.view_as(delta))


def test_the_reference_of_these_tests_is_right_on_some_samples():
    right = build_teacher()(IMAGES).argmax(1) == LABEL
    assert right[:6].all()
    assert 0 < (~right).sum() < 6


STEMS, BOTH = {"group_ridge": {"stem": 10.0}}, {"group_ridge": {"stem": 10.0, "head": 0.3}}


@pytest.mark.parametrize(
    ("options", "alpha", "beta", "scale"),
    [
        (KERNEL, 1.0, 5.0, "auto"),
        (KERNEL, 0.0, 3.0, 0.7),
        (KERNEL | BOTH | {"intercept": False}, 2.0, 0.0, "auto"),
        (CG | {"acceleration": "none"}, 1.0, 5.0, 0.7),
        (CG | {"acceleration": "sketch"} | STEMS, 1.0, 5.0, "auto"),
        (CG | {"acceleration": "sketch"}, 2.0, 0.0, 0.7),
        (CG | {"acceleration": "kfac", "preconditioner": KFAC}, 1.0, 5.0, "auto"),
    ],
)
def test_solvers_end_at_the_minimum_of_labels_and_reference(options, alpha, beta, scale):
    factors = options.get("group_ridge")
    teacher = build_teacher()
    method = build(reference=teacher, alpha=alpha, beta=beta, reference_scale=scale, **options)
    solve(method)
    problem = DenseMatching(method, *matched(teacher, alpha, beta, scale), factors=factors)
    expected, plain = problem.optimum(), dense(method, factors=factors).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()
    assert (expected - plain).norm() > 0.05 * plain.norm()


@pytest.mark.parametrize("scale", ["auto", 0.7])
def test_the_training_loss_of_sgd_is_stationary_there_on_the_full_batch(scale):
    teacher = build_teacher()
    method = build(reference=teacher, alpha=1.0, beta=5.0, reference_scale=scale, normalize_step=False, ridge=0.02)
    fit_on(build_trainer(1), method, TensorData(IMAGES, LABEL))  # settles the scale
    problem = DenseMatching(method, *matched(teacher, 1.0, 5.0, scale))

    def objective_gradient(dw):
        place(method, dw)
        batch = next(iter(TensorData(IMAGES, LABEL).train_dataloader()))
        value = method.training_loss(method(IMAGES), batch) + method.penalty()
        gradient = torch.autograd.grad(value, list(method.linearized.deltas.values()))
        return float(value.detach()), torch.cat([part.flatten() for part in gradient])

    optimum = problem.optimum()
    value, gradient = objective_gradient(optimum)
    assert value == pytest.approx(problem.objective(optimum) / SAMPLES, rel=1e-12)
    other = 0.9 * optimum
    _, away = objective_gradient(other)
    assert (away - problem.gradient(other) / SAMPLES).norm() < 1e-12 * away.norm()
    assert gradient.norm() < 1e-10 * away.norm()


@pytest.mark.parametrize("options", [{}, {"preconditioner": KFAC}])
def test_steps_of_sgd_stay_at_the_minimum(options):
    teacher = build_teacher()
    method = build(ridge=0.02, normalize_step=True, reference=teacher, **options)
    optimum = DenseMatching(method, *matched(teacher, 1.0, 5.0)).optimum()
    place(method, optimum)
    fit_on(build_trainer(3), method, TensorData(IMAGES, LABEL))
    assert (flat(method.linearized.deltas) - optimum).norm() < 1e-9 * optimum.norm()


@pytest.mark.parametrize("options", [{}, {"preconditioner": KFAC}])
@pytest.mark.parametrize("beta", [5.0, 200.0])
def test_rates_below_two_are_stable_whatever_the_weights(options, beta):
    rate = partial(torch.optim.SGD, lr=1.8)
    teacher = build_teacher(learned=SAMPLES)
    method = build(ridge=0.02, normalize_step=True, optimizer=rate, reference=teacher, beta=beta, **options)
    problem = DenseMatching(method, *matched(teacher, 1.0, beta))
    path = Path()
    fit_on(build_trainer(30, path), method, TensorData(IMAGES, LABEL))
    values = [problem.objective(dw) for dw in [torch.zeros_like(path.deltas[0]), *path.deltas]]
    assert all(after < before for before, after in itertools.pairwise(values))
    assert method.solver.top_curvature == pytest.approx((2 + beta) * _plain_curvature(options), rel=1e-12)


def _plain_curvature(options):
    method = build(ridge=0.02, normalize_step=True, **options)
    fit_on(build_trainer(1), method, TensorData(IMAGES, LABEL))
    return method.solver.top_curvature


@pytest.mark.parametrize("options", [KERNEL, CG | {"acceleration": "none"}])
def test_a_weight_of_zero_changes_nothing(options):
    plain, weightless = build(**options), build(**options, reference=build_teacher(), alpha=0.0, beta=0.0)
    for method in (plain, weightless):
        solve(method, epochs=5)
    assert torch.equal(flat(plain.linearized.deltas), flat(weightless.linearized.deltas))


def lqf_teacher(**options):
    """The optimum of LQF on the same data, as a reference."""
    old = build(**KERNEL | options)
    solve(old)
    return FrozenTeacher(old, CLASSES, VIEW, "old"), flat(old.linearized.deltas).detach().clone()


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 7.0), (3.0, 0.0), (1.0, 5.0), (1e4, 1e3)])
def test_its_own_optimum_for_a_reference_is_left_where_it_is(alpha, beta):
    # Labels and penalty are stationary there, and the distance to the reference is zero.
    teacher, dw = lqf_teacher()
    method = build(**KERNEL, reference=teacher, alpha=alpha, beta=beta, reference_scale=1.0)
    solve(method)
    assert (flat(method.linearized.deltas) - dw).norm() < 1e-9 * dw.norm()


def test_strong_matching_leaves_the_reference_as_far_as_the_ridge_allows():
    # ((1 + alpha) J^T J + lambda M) (dw - dw*) = (lambda* - lambda) M dw*, where lambda* has given the reference dw*.
    teacher, dw = lqf_teacher(ridge=0.1)
    apart = []
    for alpha in (1.0, 1e2, 1e4):
        method = build(**KERNEL, reference=teacher, alpha=alpha, beta=0.0, reference_scale=1.0)
        solve(method)
        moved = flat(method.linearized.deltas).detach() - dw
        problem = DenseMatching(method, *matched(teacher, alpha, 0.0, 1.0))
        hessian = torch.einsum("bcp,bcq->pq", problem.rows, problem.rows)
        left = (1 + alpha) * hessian @ moved + problem.ridge * problem.metric @ moved
        right = SAMPLES * (0.1 - 0.02) * problem.metric @ dw
        assert (left - right).norm() < 1e-7 * right.norm()
        apart.append(float((method(IMAGES) - teacher(IMAGES)).detach().norm()))
    assert apart[2] < 0.02 * apart[1] < 0.02 * apart[0]


def test_classes_are_matched_by_name():
    names = ["cat", "dog", "ant"]  # "bee" is not known, "dog" is not trained
    teacher = build_teacher(names)
    raw = teacher(IMAGES)
    known, position = LABEL != 1, torch.tensor([2, -1, 0])[LABEL]
    right = raw.argmax(1) == position  # among all of its classes
    assert 0 < right.sum() < known.sum()
    shared = raw[:, [2, 0]]
    centered = shared - shared.mean(1, keepdim=True)
    design = torch.stack([centered[known].flatten(), torch.ones_like(centered[known]).flatten()], 1)
    factor, level = torch.linalg.lstsq(design, TARGET[known][:, [0, 2]].flatten()).solution
    reference = TARGET.clone()
    reference[:, [0, 2]] = factor * centered + level
    method = build(**KERNEL, reference=teacher, alpha=1.0, beta=5.0)
    note = Note()
    solve(method, callbacks=[note])
    problem = DenseMatching(method, known * (1 + 5 * right.double()), reference)
    expected = problem.optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()
    mean = (problem.objective(expected) - 0.5 * problem.ridge * expected @ problem.metric @ expected) / SAMPLES
    assert note.rows[0]["train/loss"] == pytest.approx(float(mean), rel=1e-6)


def stored(teacher, name="old.parquet", images=IMAGES):
    logits = teacher(images)
    table = pd.DataFrame({"index": range(len(images)), "prediction": [teacher.classes[i] for i in logits.argmax(1)]})
    table["logits"] = list(logits.float().numpy())
    return StoredPredictions(table, teacher.classes, name)


@pytest.mark.parametrize("options", [KERNEL, CG, {"ridge": 0.02}])
def test_stored_outputs_serve_on_fixed_images(options):
    teacher = build_teacher()
    first, second = build(**options, reference=teacher), build(**options, reference=stored(teacher))
    for method in (first, second):
        solve(method, epochs=2)
    first, second = flat(first.linearized.deltas), flat(second.linearized.deltas)
    assert (first - second).norm() < 1e-6 * first.norm()  # the file has single precision


def test_an_ensemble_is_matched_in_its_mean():
    members = [build_teacher(seed=seed) for seed in (3, 4)]
    ensemble = EnsembleTeacher(members)
    method = build(**KERNEL, reference=ensemble)
    solve(method)

    class Mean(nn.Module):
        def forward(self, images):
            return (members[0](images) + members[1](images)) / 2

    whole = FrozenTeacher(Mean(), CLASSES, VIEW, "mean")
    expected = DenseMatching(method, *matched(whole, 1.0, 5.0)).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("options", [KERNEL, CG, {"ridge": 0.02}])
def test_the_loss_of_training_has_the_reference_and_that_of_evaluation_has_not(options):
    teacher = build_teacher()
    method = build(**options, reference=teacher, alpha=1.0, beta=5.0, reference_scale=0.7)
    trainer = build_trainer(1, limit_val_batches=1.0)
    before = outputs_at_start(IMAGES)
    fit_on(trainer, method, TensorData(IMAGES, LABEL, 11))
    outputs = method(IMAGES).detach() if "solver" in options else before
    focus, reference = matched(teacher, 1.0, 5.0, 0.7)
    labels = scaled_squared_loss(outputs, LABEL, ALPHA)
    matching = (focus * (outputs - reference).square().sum(1)).mean() / 2
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(labels + matching), rel=1e-6)
    final = scaled_squared_loss(method(IMAGES).detach(), LABEL, ALPHA)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(final), rel=1e-6)


class CountsForwards(nn.Module):
    """How often samples go through a reference."""

    def __init__(self, model):
        super().__init__()
        self.model, self.samples = model, 0

    def forward(self, images):
        self.samples += len(images)
        return self.model(images)


@pytest.mark.parametrize(("options", "passes"), [(KERNEL, 1), (CG, 1), ({"ridge": 0.02}, 4)])
def test_exact_solvers_ask_the_reference_once(options, passes):
    counts = CountsForwards(build_teacher().model)
    solve(build(**options, reference=FrozenTeacher(counts, CLASSES, VIEW, "old")), epochs=3)
    assert counts.samples == passes * SAMPLES  # sgd: once for the scale, and in every epoch


def test_the_reference_is_neither_changed_nor_kept(tmp_path):
    teacher = build_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    method = build(**KERNEL, reference=teacher, alpha=2.0, beta=3.0)
    solve(method).save_checkpoint(tmp_path / "run.ckpt")
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == build(**KERNEL).state_dict().keys()
    options = checkpoint["hyper_parameters"]
    assert "reference" not in options
    assert (options["alpha"], options["beta"], options["reference_fingerprint"]) == (2.0, 3.0, teacher.fingerprint)
    alone = build(**KERNEL, alpha=2.0, beta=3.0)
    trainer = build_trainer(1, limit_test_batches=1.0)
    (values,) = trainer.test(alone, TensorData(IMAGES, LABEL), tmp_path / "run.ckpt", verbose=False, weights_only=True)
    expected = scaled_squared_loss(method(IMAGES).detach(), LABEL, ALPHA)
    assert values["test/loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("options", [CG | {"acceleration": "none"}, CG | {"acceleration": "sketch"}])
def test_a_resumed_run_goes_on_and_another_reference_starts_anew(options, tmp_path, caplog):
    whole, parts = (build(**options, reference=build_teacher()) for _ in range(2))
    solve(whole, epochs=4)
    solve(parts, epochs=2).save_checkpoint(tmp_path / "run.ckpt")
    resumed = build(**options, reference=build_teacher())
    solve(resumed, epochs=4, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert torch.equal(flat(resumed.linearized.deltas), flat(whole.linearized.deltas))
    assert not [text for text in caplog.messages if "start anew" in text]
    for changed in ({"reference": build_teacher(seed=9)}, {"reference": build_teacher(), "beta": 4.0}, {}):
        caplog.clear()
        solve(build(**options, **changed), epochs=4, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
        assert len([text for text in caplog.messages if "start anew" in text]) == 1


def test_a_solved_run_is_solved_again_for_another_reference(tmp_path):
    solve(build(**KERNEL, reference=build_teacher())).save_checkpoint(tmp_path / "run.ckpt")
    method = build(**KERNEL, reference=(teacher := build_teacher(seed=9)))
    solve(method, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    expected = DenseMatching(method, *matched(teacher, 1.0, 5.0)).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()


def resume_sgd(checkpoint, epochs, **options):
    trainer = build_trainer(epochs)
    start = {"ckpt_path": checkpoint, "weights_only": True} if checkpoint.exists() else {}
    fit_on(trainer, build(**{"ridge": 0.02, "normalize_step": False, **options}), TensorData(IMAGES, LABEL), **start)
    if not start:
        trainer.save_checkpoint(checkpoint)
    return trainer


@pytest.mark.parametrize("changed", [{"alpha": 2.0}, {"beta": 4.0}, {"reference_scale": 0.7}, "another", "none"])
def test_sgd_does_not_go_on_with_another_objective(changed, tmp_path):
    old = {"reference": build_teacher()}
    others = {"another": {"reference": build_teacher(seed=9)}, "none": {"reference": None}}
    changed = others[changed] if isinstance(changed, str) else changed
    resume_sgd(tmp_path / "run.ckpt", 1, **old)
    (name,) = changed
    with pytest.raises(ValueError, match=rf"{name}\w* was .* and is .* now\. Set hydra.run.dir to another folder"):
        resume_sgd(tmp_path / "run.ckpt", 2, **(old | changed))
    alone = build(**{"ridge": 0.02, **old, **changed})
    build_trainer(1, limit_test_batches=1.0).test(
        alone, TensorData(IMAGES, LABEL), tmp_path / "run.ckpt", verbose=False, weights_only=True
    )
    assert resume_sgd(tmp_path / "run.ckpt", 2, **old).global_step == 2


def test_without_a_reference_its_strengths_do_not_matter_and_one_that_is_added_does(tmp_path):
    resume_sgd(tmp_path / "run.ckpt", 1)
    assert resume_sgd(tmp_path / "run.ckpt", 2, beta=3.0).global_step == 2
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    del stored["hyper_parameters"]["reference_fingerprint"]  # as written before there were references
    torch.save(stored, tmp_path / "run.ckpt")
    assert resume_sgd(tmp_path / "run.ckpt", 2).global_step == 2
    with pytest.raises(ValueError, match="reference_fingerprint was None and is"):
        resume_sgd(tmp_path / "run.ckpt", 2, reference=build_teacher())


def left_out(problem, ridge):
    """Outputs on each sample of the optimum without it, refitted."""
    outputs = []
    for i in range(SAMPLES):
        keep = [j for j in range(SAMPLES) if j != i]
        rows, focus = problem.rows[keep], problem.focus[keep]
        hessian = torch.einsum("b,bcp,bcq->pq", 1 + focus, rows, rows) + ridge * problem.metric
        pull = problem.target - problem.start + problem.focus[:, None] * (problem.reference - problem.start)
        dw = torch.linalg.solve(hessian, torch.einsum("bcp,bc->p", rows, pull[keep]))
        outputs.append(problem.start[i] + problem.rows[i] @ dw)
    return torch.stack(outputs)


def test_leave_one_out_takes_reference_and_label_away_and_judges_by_the_label():
    class Wrong(nn.Module):  # sure of the next class, where it is wrong
        def forward(self, images):
            return 9.0 * one_hot((LABEL[: len(images)] + torch.arange(len(images)) % 3) % 3, 3).double()

    teacher = FrozenTeacher(Wrong(), CLASSES, VIEW, "wrong")
    method = build(solver="kernel", ridge="auto", reference=teacher, alpha=3.0, beta=1.0, reference_scale=1.0)
    trainer = build_trainer(1)
    fit_on(trainer, method, TensorData(IMAGES, LABEL))
    problem = DenseMatching(method, *matched(teacher, 3.0, 1.0, 1.0))
    scores = []
    for number, ridge in enumerate(method.path.ridges.tolist()):
        outputs = left_out(problem, ridge)
        accuracy, press = (outputs.argmax(1) == LABEL).double().mean(), (outputs - TARGET).square().sum()
        assert float(method.path.accuracy[number]) == pytest.approx(float(accuracy), abs=1e-12)
        assert float(method.path.press[number]) == pytest.approx(float(press), rel=1e-6)
        scores.append((float(accuracy), -float(press), ridge))
    assert method.ridge == pytest.approx(max(scores)[2] / SAMPLES, rel=1e-12)
    mixed = problem.target + problem.focus[:, None] * problem.reference
    assert (mixed.argmax(1) != LABEL).sum() > 3  # what is fitted would judge otherwise


def watched():
    """Held-out samples, of which the reference of these tests gets some right."""
    return draw(9, seed=7)


def test_the_tradeoff_is_what_a_run_of_each_strength_gives():
    teacher, (images, label) = build_teacher(learned=SAMPLES), watched()
    grid = {"alpha": [0.0, 2.0], "beta": [0.0, 5.0, 50.0]}
    method = build(**KERNEL, reference=teacher, tradeoff=grid)
    trainer = build_trainer(1)
    fit_on(trainer, method, TensorData(IMAGES, LABEL, 4, val=(images, label)))
    curve, old_right = method.tradeoff_curve, teacher(images).argmax(1) == label
    assert list(zip(curve.alpha.tolist(), curve.beta.tolist(), strict=True)) == [
        (alpha, beta) for alpha in grid["alpha"] for beta in grid["beta"]
    ]
    for p in range(6):
        alone = build(**KERNEL, reference=teacher, alpha=float(curve.alpha[p]), beta=float(curve.beta[p]))
        solve(alone)
        right = alone(images).argmax(1) == label
        assert torch.equal(curve.new_right[p], right)
        table = [[(~old_right & ~right).sum(), (~old_right & right).sum()],
                 [(old_right & ~right).sum(), (old_right & right).sum()]]  # fmt: skip
        assert curve.counts[p].tolist() == [[int(entry) for entry in row] for row in table]
        problem = DenseMatching(alone, *matched(teacher, float(curve.alpha[p]), float(curve.beta[p])))
        assert float(curve.objective[p]) == pytest.approx(problem.objective(problem.optimum()), rel=1e-9)
    assert len(curve.counts.unique(dim=0)) > 1
    assert curve.relative_gradient.max() < 1e-9


def test_a_second_fit_asks_the_reference_again():
    teacher, (images, label) = build_teacher(learned=SAMPLES), draw(SAMPLES, seed=5)
    method, fresh = (build(**KERNEL, reference=teacher, reference_scale=1.0) for _ in range(2))
    solve(method)
    for one in (method, fresh):
        fit_on(build_trainer(1), one, TensorData(images, label, 4))
    assert torch.equal(flat(method.linearized.deltas), flat(fresh.linearized.deltas))


def test_flips_are_counted_by_the_names_of_classes():
    teacher, (images, label) = build_teacher(["cat", "dog", "ant"]), draw(60, seed=7)
    method = build(**KERNEL, reference=teacher, tradeoff={"alpha": [1.0], "beta": [5.0]})
    fit_on(build_trainer(1), method, TensorData(IMAGES, LABEL, 4, val=(images, label)))
    known, position = label != 1, torch.tensor([2, -1, 0])[label]
    right = (method(images).argmax(1) == label)[known]
    old_right = (teacher(images).argmax(1) == position)[known]
    assert torch.equal(method.tradeoff_curve.old_right, old_right)
    assert torch.equal(method.tradeoff_curve.new_right[0], right)
    assert method.tradeoff_curve.reference_error == pytest.approx(float((~old_right).double().mean()))


def test_the_tradeoff_of_stored_predictions_is_that_of_the_model():
    teacher, (images, label) = build_teacher(), watched()
    curves = []
    for reference in (teacher, stored(teacher, images=torch.cat([IMAGES, images]))):
        method = build(**KERNEL, reference=reference, tradeoff={"alpha": [1], "beta": [0, 9]})
        data = Numbered(IMAGES, LABEL, 4, val=(images, label))
        fit_on(build_trainer(1), method, data)
        curves.append(method.tradeoff_curve)
    assert torch.equal(curves[0].counts, curves[1].counts)


class Numbered(TensorData):
    """Validation samples are numbered after the training samples, as in a manifest."""

    def val_dataloader(self):
        from torch.utils.data import DataLoader

        from lqf_lightning.data import Batch

        images, label = self.splits["val"]
        batch = Batch(images, label, SAMPLES + torch.arange(len(label)))
        return DataLoader([batch], batch_size=None)


def test_no_tradeoff_is_computed_unless_asked_for():
    method = build(**KERNEL, reference=build_teacher())
    solve(method)
    assert method.tradeoff_curve is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, r"`alpha` must be at least 0 and finite, got -1\.0\. Set method\.alpha=1"),
        ({"beta": math.inf}, r"`beta` must be .* got inf\. Set method\.beta=5"),
        ({"reference_scale": 0.0}, r"got 0\.0\. Set method\.reference_scale=auto"),
        ({"reference_scale": "big"}, r"got 'big'\. Set method\.reference_scale=auto"),
        ({"tradeoff": {"alpha": [0]}, "solver": "kernel"}, r"got \{'alpha': \[0\]\}\. Set 'method\.tradeoff=\{alpha"),
        ({"tradeoff": {"alpha": [0], "beta": [-1]}, "solver": "kernel"}, r"`tradeoff\.beta` must be .* got \[-1\]"),
        ({"tradeoff": {"alpha": [], "beta": [1]}, "solver": "kernel"}, r"`tradeoff\.alpha` must be .* got \[\]"),
        ({"tradeoff": {"alpha": [0], "beta": [1]}, "solver": "cg"}, r"got solver=cg\. Set method\.solver=kernel"),
    ],
)
def test_wrong_options_name_the_override(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


class Augmented(TensorData):
    """Says that its training images are drawn anew in every epoch."""

    training_transform = type("Crop", (), {"random": True})()


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (KERNEL | {"tradeoff": {"alpha": [0], "beta": [1]}}, TensorData(IMAGES, LABEL), "got none. Set reference=RUN"),
        (
            KERNEL | {"tradeoff": {"alpha": [0], "beta": [1]}, "reference": build_teacher()},
            TensorData(IMAGES, LABEL, val=None),
            r"there is none\. Set data\.val_fraction=0\.1, or method\.tradeoff=null",
        ),
        (
            {"loss": "cross_entropy", "reference": build_teacher()},
            TensorData(IMAGES, LABEL),
            r"got loss='cross_entropy'\. Set method\.loss=squared",
        ),
        (
            {"reference": stored(build_teacher())},
            Augmented(IMAGES, LABEL),
            r"solver=sgd trains on augmented ones\. Set method\.solver=cg or data/augmentation=none",
        ),
        (
            KERNEL
            | {"reference": StoredPredictions(pd.DataFrame({"index": [0], "prediction": ["ant"]}), CLASSES, "x")},
            TensorData(IMAGES, LABEL),
            r"no column `logits`, and outputs are what is matched\. Set reference",
        ),
    ],
)
def test_references_that_cannot_be_matched_are_refused_before_anything_is_computed(options, data, message, monkeypatch):
    from lqf_lightning.methods.solvers.training_table import TrainingTable

    monkeypatch.setattr(TrainingTable, "collect", lambda *_: pytest.fail("this should have been refused before"))
    with pytest.raises(ValueError, match=message):
        fit_on(build_trainer(1), build(**options), data)


def test_stored_outputs_of_exact_solvers_go_with_any_augmentation():
    method = build(**KERNEL, reference=stored(build_teacher()))
    fit_on(build_trainer(1), method, Augmented(IMAGES, LABEL))


def test_a_validation_set_too_large_for_the_tradeoff_is_refused(monkeypatch):
    from lqf_lightning.methods.solvers import kernel

    monkeypatch.setattr(kernel, "_LIMIT", 35)
    method = build(**KERNEL, reference=build_teacher(), tradeoff={"alpha": [0], "beta": [1]})
    with pytest.raises(
        ValueError, match=r"at most 35 validation samples times classes, got 12 x 3 = 36\. Set data\.val"
    ):
        fit_on(build_trainer(1), method, TensorData(IMAGES, LABEL, val=draw(12, seed=7)))


def test_a_reference_no_better_than_chance_has_no_scale():
    teacher = build_teacher()
    with torch.no_grad():
        teacher.model[1].weight.neg_()
        teacher.model[1].bias.neg_()
    with pytest.raises(ValueError, match=r"not larger for the right one\. Set method\.reference_scale=1\.0"):
        solve(build(**KERNEL, reference=teacher))


def test_a_reference_of_other_classes_is_refused_at_once():
    other = FrozenTeacher(build_teacher().model, ["x", "y", "z"], VIEW, "other")
    with pytest.raises(ValueError, match="share no name"):
        build(reference=other)


def test_a_scale_is_not_fitted_to_a_single_class():
    other = build_teacher(classes=["bee", "x", "y"])
    with pytest.raises(ValueError, match=r"old shares only \['bee'\] with the data\. Set method\.reference_scale=1\.0"):
        build(reference=other)
    build(reference=other, reference_scale=1.0)


def test_classes_that_the_reference_lacks_are_told(caplog):
    solve(build(**KERNEL, reference=build_teacher(classes=["bee", "x", "ant"])))
    assert caplog.text.count("old: the old model does not know [cat]; it knows [x], which the data lack") == 1
    caplog.clear()
    solve(build(**KERNEL, reference=build_teacher()))
    assert "does not know" not in caplog.text


class Sabotage(Callback):
    """Makes the first step far too long."""

    def on_train_start(self, trainer, pl_module):
        pl_module.solver.top_curvature *= 1e-4


@pytest.mark.parametrize(("scale", "stops"), [("auto", True), (0.7, False)])
def test_divergence_is_told_where_the_loss_of_predicting_nothing_is_known(scale, stops):
    method = build(ridge=0.02, normalize_step=True, reference=build_teacher(), reference_scale=scale)
    trainer = build_trainer(2, Sabotage())
    if not stops:
        fit_on(trainer, method, TensorData(IMAGES, LABEL, 4))
        return
    with pytest.raises(FloatingPointError, match="training diverges"):
        fit_on(trainer, method, TensorData(IMAGES, LABEL, 4))


def test_the_scale_is_told(caplog):
    caplog.set_level(logging.INFO, "lqf_lightning")
    teacher = build_teacher()
    solve(build(**KERNEL, reference=teacher))
    _, reference = matched(teacher, 1.0, 5.0)
    raw = teacher(IMAGES)
    factor = float((reference[0, 0] - reference[0, 1]) / (raw[0, 0] - raw[0, 1]))
    assert any(f"outputs of old are multiplied by {factor:.4g}" in text for text in caplog.messages)


def test_the_jacobian_of_these_tests_tells_strengths_apart():
    rows = jacobian(IMAGES, list(build().linearized.deltas))
    assert torch.linalg.matrix_rank(rows.flatten(0, 1)) > 20
