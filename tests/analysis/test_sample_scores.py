import copy

import pytest
import torch
from lightning import Callback
from torch.nn.functional import one_hot

from lqf_lightning.analysis import problem_of_run, score_samples
from lqf_lightning.analysis.group_scores import score_groups
from lqf_lightning.analysis.influence_now import DAMPING, influence_now
from lqf_lightning.methods import Finetune
from lqf_lightning.methods.solvers.tensor_folder import TensorFolder
from methods.dense_lqf import ALPHA, DenseProblem, build, jacobian, outputs_at_start, penalized
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from ranks import run_on_ranks

TRAIN, VAL = draw(11, 1), draw(7, 2)
EXACT = {"solver": "kernel", "ridge": 0.02}
COLUMNS = ("prediction", "residual", "weight_information", "function_information", "leverage", "langevin_information")


class Look(Callback):
    def __init__(self, look):
        self.look, self.found = look, None

    def on_train_start(self, trainer, pl_module):
        self.found = self.look(pl_module)


def at_start(method, look):
    """What `look` finds when the method starts to train."""
    seen = Look(look)
    fit_on(build_trainer(1, seen), method, TensorData(*TRAIN, 4, val=VAL))
    return seen.found


def refit(keep, names=None):
    images, label = TRAIN
    names = names or [name for group in build_backbone().groups.values() for name in group]
    return DenseProblem(images[keep], label[keep], names, EXACT["ridge"] * 11), names


def without(row, names=None):
    problem, names = refit([other for other in range(11) if other != row], names)
    return problem.optimum(), names


@pytest.fixture(scope="module")
def scores():
    return at_start(build(**EXACT), lambda method: score_samples(problem_of_run(method), sigma=2.0, temperature=0.5))


def test_every_score_is_that_of_a_refit_without_the_sample(scores):
    full, names = refit(list(range(11)))
    optimum, weigh = full.optimum(), penalized(names)
    rows, val_rows = jacobian(TRAIN[0], names), jacobian(VAL[0], names)
    for row in range(11):
        moved = optimum - without(row)[0]
        prediction = outputs_at_start(TRAIN[0][row : row + 1])[0] + rows[row] @ (optimum - moved)
        torch.testing.assert_close(scores.prediction[row], prediction, rtol=1e-7, atol=1e-8)
        target = ALPHA * one_hot(TRAIN[1][row], 3)
        torch.testing.assert_close(scores.residual[row], target - prediction, rtol=1e-7, atol=1e-8)
        assert scores.weight_information[row].item() == pytest.approx(((moved * weigh) @ moved).item() / 8, rel=1e-6)
        change = (val_rows @ moved).square().sum(1).mean()
        assert scores.function_information[row].item() == pytest.approx(change.item() / 8, rel=1e-6)
        assert scores.langevin_information[row].item() == pytest.approx(
            (moved @ full.hessian @ moved).item() / 0.5, rel=1e-6
        )
        right, alone = ((out.argmax() == TRAIN[1][row]).item() for out in (full.outputs(optimum)[row], prediction))
        assert scores.memorization[row].item() == right - alone
        assert scores.suspects.proposed[row] == prediction.argmax()


def test_leverages_add_up_to_the_degrees_of_freedom(scores):
    full, _ = refit(list(range(11)))
    flat_rows = full.rows.flatten(0, 1)
    degrees = torch.trace(flat_rows @ torch.linalg.solve(full.hessian, flat_rows.T))
    assert scores.leverage.sum().item() == pytest.approx(degrees.item(), rel=1e-7)


def test_settings_say_what_scores_depend_on(scores):
    settings = scores.settings
    assert settings["kernel"] == "full"
    assert settings["exact"]
    assert settings["time"] is None
    assert settings["sigma"] == 2.0
    assert settings["ridge"] == pytest.approx(0.22)
    assert settings["validation_samples"] == 7


@pytest.mark.filterwarnings("ignore:.*sync_dist=True.*")  # the group of the test is not one of the trainer's
def test_scores_are_the_same_on_any_number_of_ranks(scores):
    def rank():
        found = at_start(build(**EXACT), lambda m: score_samples(problem_of_run(m), sigma=2.0, temperature=0.5))
        return {name: getattr(found, name) for name in (*COLUMNS, "index", "steady_state_information")}

    for world in (2, 3):
        for found in run_on_ranks(world, rank):
            for name, values in found.items():
                torch.testing.assert_close(values, getattr(scores, name), rtol=1e-7, atol=1e-9)


def test_without_validation_images_there_is_no_information_in_outputs():
    found = at_start(build(**EXACT), lambda m: score_samples(problem_of_run(m, validation=False)))
    assert found.function_information is None
    assert found.settings["validation_samples"] == 0


def test_at_a_finite_time_scores_are_those_of_short_descents():
    time = 3.0
    found = at_start(
        build(**EXACT, intercept=False), lambda method: score_samples(problem_of_run(method), time=time, sigma=1.0)
    )
    names = list(refit([0, 1])[1])
    weigh = torch.ones(int(sum(p.numel() for p in build_backbone().model.parameters())), dtype=torch.float64)

    def descend(keep):
        images, label = TRAIN[0][keep], TRAIN[1][keep]
        problem = DenseProblem(images, label, names, 0.22, torch.diag(weigh))
        values, vectors = torch.linalg.eigh(problem.hessian)
        pull = -torch.einsum("bcp,bc->p", problem.rows, problem.start - problem.target)
        return vectors @ (-torch.expm1(-time / 11 * values) / values * (vectors.T @ pull))

    whole = descend(list(range(11)))
    for row in (0, 4):
        moved = whole - descend([other for other in range(11) if other != row])
        assert found.weight_information[row].item() == pytest.approx((moved @ moved).item() / 2, rel=1e-5)
        change = (jacobian(VAL[0], names) @ moved).square().sum(1).mean()
        assert found.function_information[row].item() == pytest.approx(change.item() / 2, rel=1e-5)
    assert found.leverage is None


def test_groups_are_those_of_refits_without_them():
    groups = {"early": torch.tensor([0, 1, 2]), "one": torch.tensor([7])}
    table = at_start(build(**EXACT), lambda method: score_groups(problem_of_run(method), groups, sigma=1.0))
    full, names = refit(list(range(11)))
    weigh = penalized(names)
    for name, rows in groups.items():
        rest, _ = refit([row for row in range(11) if row not in rows.tolist()], names)
        moved = full.optimum() - rest.optimum()
        (row,) = table[table["group"] == name].to_dict("records")
        assert row["weight_information"] == pytest.approx(((moved * weigh) @ moved / 2).item(), rel=1e-6)
        change = (jacobian(VAL[0], names) @ moved).square().sum(1).mean()
        assert row["function_information"] == pytest.approx(change.item() / 2, rel=1e-6)
        outputs = full.start[rows] + full.rows[rows] @ rest.optimum()
        assert row["accuracy_without"] == (outputs.argmax(1) == TRAIN[1][rows]).double().mean().item()


def test_fine_tuning_is_looked_at_through_the_expansion_of_its_network():
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD, loss="squared", target_scale=ALPHA)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    found = at_start(
        method, lambda m: [problem_of_run(m, form="full"), {n: v.clone() for n, v in m.state_dict().items()}]
    )
    run, after = found
    assert all(torch.equal(value, before[name]) for name, value in after.items())  # the network is not touched
    assert all(parameter.requires_grad for parameter in method.model.parameters())
    assert run.method is not method
    names = [name for group in build_backbone().groups.values() for name in group]
    rows = jacobian(TRAIN[0], names)[:, :, penalized(names).bool()].flatten(0, 1)
    torch.testing.assert_close(run.kernel.total()[0], rows @ rows.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.problem.target, ALPHA * one_hot(TRAIN[1], 3).double())


def test_influence_at_trained_weights_is_that_of_a_dense_trace_kernel():
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD, loss="cross_entropy")
    index, influence = at_start(method, influence_now)
    names = [name for group in build_backbone().groups.values() for name in group]
    rows = jacobian(TRAIN[0], names)[:, :, penalized(names).bool()]
    kernel = torch.einsum("icp,jcp->ij", rows, rows) / 3
    ridge = DAMPING * kernel.diagonal().mean()
    ones = torch.ones(11, 1, dtype=torch.float64)
    bordered = torch.cat([
        torch.cat([kernel + ridge * torch.eye(11), ones], 1),
        torch.cat([ones.T, torch.zeros(1, 1)], 1),
    ])
    leverage = 1 - ridge * torch.linalg.inv(bordered)[:11, :11].diagonal()
    gradient = outputs_at_start(TRAIN[0]).softmax(1) - one_hot(TRAIN[1], 3)
    torch.testing.assert_close(influence, leverage * gradient.square().sum(1), rtol=1e-6, atol=1e-9)
    assert index.tolist() == list(range(11))


def test_an_interrupted_assembly_goes_on_from_its_folder(tmp_path, monkeypatch):
    def look(method):
        return problem_of_run(method, folder=tmp_path).kernel.total()

    def pull_the_plug(self, key, tensor, keep=TensorFolder.__setitem__):
        if len(self) == 3:
            raise KeyboardInterrupt
        keep(self, key, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(TensorFolder, "__setitem__", pull_the_plug)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            at_start(build(**EXACT), look)
    kept = TensorFolder(tmp_path)
    assert len(kept) == 3  # of six: three layer groups, among the training samples and with the validation samples
    whole = at_start(build(**EXACT), lambda method: problem_of_run(method).kernel.total())
    assert torch.equal(at_start(build(**EXACT), look), whole)
    for name in list(kept):
        kept[name] = kept[name] * 2
    assert torch.equal(at_start(build(**EXACT), look), 2 * whole)  # so they are used


def test_large_kernels_are_of_all_layers_together(scores, monkeypatch):
    monkeypatch.setattr("lqf_lightning.analysis.run_problem.APART", 10)
    run = at_start(build(**EXACT), problem_of_run)
    assert len(run.kernel.groups) == 1
    found = score_samples(run, sigma=2.0)
    torch.testing.assert_close(found.function_information, scores.function_information, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing(scores, chunk):
    found = at_start(build(**EXACT), lambda m: score_samples(problem_of_run(m, chunk_size=chunk), sigma=2.0))
    torch.testing.assert_close(found.function_information, scores.function_information, rtol=1e-7, atol=1e-10)


def test_a_kernel_that_is_too_large_is_refused_with_the_share_that_fits(monkeypatch):
    monkeypatch.setattr("lqf_lightning.analysis.run_problem.LIMIT", 20)
    with pytest.raises(ValueError, match=r"has 33 rows, the limit is 20.*data.subset_ratio=0.55"):
        at_start(build(**EXACT), lambda m: problem_of_run(m, form="full"))


def test_early_in_fine_tuning_each_sample_tells_what_training_without_it_changes():
    """The true change of descent by the nonlinear network; at its start the head's bias has hardly moved, either."""
    rate, steps = 1e-4, 5
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD, loss="squared", batch_norm="frozen", target_scale=ALPHA)
    start = copy.deepcopy(method.backbone.model).eval()
    found = at_start(
        method, lambda m: score_samples(problem_of_run(m, intercept=False).nearly_free(), time=rate * steps)
    )
    dtype, (images, label) = next(start.parameters()).dtype, TRAIN

    def outputs(keep):
        network = copy.deepcopy(start)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            wanted = ALPHA * one_hot(label[keep], 3)
            (0.5 * (network(images[keep].to(dtype)) - wanted).square().sum() / len(label)).backward()
            optimizer.step()
        with torch.no_grad():
            return network(VAL[0].to(dtype)).double()

    full = outputs(list(range(11)))
    moved = torch.stack([full - outputs([other for other in range(11) if other != row]) for row in range(11)])
    true = 0.5 * moved.square().sum(2).mean(1)
    torch.testing.assert_close(found.function_information, true, rtol=0.05, atol=0)
