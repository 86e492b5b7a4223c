import json
import math
from functools import partial

import pytest
import torch
from lqf_lightning.callbacks.knn import KNN
from torch import nn

from lqf_lightning.backbones import penultimate_features
from lqf_lightning.linear import current_reducer
from lqf_lightning.methods import LQF, Finetune
from lqf_lightning.train import build_method
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from ranks import run_on_ranks
from tiny import compose, run_tiny, tiny_overrides

NOTHING_TO_VALIDATE = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
SLOW_TEACHER = {"optimizer": partial(torch.optim.SGD, lr=0.5), "teacher": "eman", "momentum": 0.9}


def split(number, seed):
    """Classes that overlap, so that no accuracy is 0 or 1."""
    images, target = draw(number, seed)
    return images + 0.25 * (target - 1).view(-1, 1, 1, 1), target


TRAIN, VAL, TEST = split(31, 1), split(23, 2), split(29, 3)


def data(**others):
    return TensorData(*TRAIN, batch_size=8, **{"val": VAL, "test": TEST, **others})


def features(network, images):
    body = nn.Sequential(*list(network)[:-1])
    modes = [(module, module.training) for module in body.modules()]
    rows = body.eval()(images).detach().double()
    for module, mode in modes:
        module.training = mode
    return rows


def vote(rows, memory, label, k, temperature):
    """Class by class and neighbor by neighbor, for one query."""
    cosines = [float(rows @ other / (rows.norm() * other.norm())) for other in memory]
    nearest = sorted(range(len(memory)), key=lambda row: -cosines[row])[:k]
    weight = [1.0 if temperature is None else math.exp(cosines[row] / temperature) for row in nearest]
    votes = [sum(w for w, row in zip(weight, nearest, strict=True) if label[row] == c) for c in range(len(CLASSES))]
    return votes.index(max(votes))


def brute_force(memory, queries, k, temperature=None):
    right = [vote(rows, *memory, k, temperature) == int(c) for rows, c in zip(*queries, strict=True)]
    return sum(right) / len(right)


def accuracy(network, queries, k, temperature=None, memory=slice(None)):
    known = features(network, TRAIN[0][memory]), TRAIN[1][memory]
    return brute_force(known, (features(network, queries[0]), queries[1]), k, temperature)


def train(method, *callbacks, epochs=2, samples=None):
    trainer = build_trainer(epochs, *callbacks, limit_val_batches=1.0)
    fit_on(trainer, method, samples or data())
    return trainer


@pytest.mark.parametrize(("k", "temperature"), [(1, None), (12, None), (20, 0.05)])
def test_student_and_teacher_are_judged_by_their_neighbors(k, temperature):
    method = Finetune(build_backbone(), CLASSES, **SLOW_TEACHER)
    trainer = train(method, KNN(k, temperature))
    networks = {"val/knn_acc": method.model, "val/teacher_knn_acc": method.teacher.model}
    expected = {name: accuracy(network, VAL, k, temperature) for name, network in networks.items()}
    assert {name: trainer.callback_metrics[name].item() for name in networks} == pytest.approx(expected)

    (tested,) = trainer.test(method, datamodule=data(), verbose=False)
    assert tested["test/knn_acc"] == pytest.approx(accuracy(method.model, TEST, k, temperature))
    assert tested["test/teacher_knn_acc"] == pytest.approx(accuracy(method.teacher.model, TEST, k, temperature))


def test_what_is_compared_differs():
    """Else the test above would not see student and teacher, or two choices of k, mixed up."""
    method = Finetune(build_backbone(), CLASSES, **SLOW_TEACHER)
    train(method)
    values = {k: [accuracy(network, VAL, k) for network in (method.model, method.teacher.model)] for k in (1, 12, 20)}
    assert any(student != teacher for student, teacher in values.values())
    assert len({student for student, _ in values.values()}) > 1
    assert accuracy(method.model, VAL, 20) != accuracy(method.model, VAL, 20, 0.05)


def test_without_an_averaged_teacher_the_student_is_judged_alone():
    trainer = train(Finetune(build_backbone(), CLASSES, optimizer=SGD), KNN(5))
    assert "val/knn_acc" in trainer.callback_metrics
    assert "val/teacher_knn_acc" not in trainer.callback_metrics


def test_a_teacher_in_single_precision_may_follow_a_student_in_half():
    method = Finetune(build_backbone(), CLASSES, **SLOW_TEACHER).to(torch.bfloat16)
    assert {p.dtype for p in method.teacher.parameters()} != {p.dtype for p in method.model.parameters()}
    got = report(method, KNN(5))
    assert got["val/teacher_knn_acc"] == pytest.approx(accuracy(method.teacher.model, VAL, 5))
    assert 0 < got["val/knn_acc"] < 1


def report(method, callback, samples=None):
    """Look at a method in the modes in which it is, outside of an evaluation."""
    trainer = build_trainer(1)
    trainer.datamodule, logged = samples or data(), {}
    method.log = lambda name, value, **_: logged.__setitem__(name, value)
    callback._report(trainer, method, "val")
    return logged


@pytest.mark.parametrize(("size", "k"), [(10, 3), (30, 4), (31, 5)])
def test_a_large_memory_is_drawn_by_lot(size, k):
    chosen = torch.randperm(31, generator=torch.Generator().manual_seed(0))[:size].sort().values
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    got = report(method, KNN(k, max_memory=size))
    assert got["val/knn_acc"] == pytest.approx(accuracy(method.model, VAL, k, memory=chosen))


def test_samples_that_are_not_drawn_are_not_loaded():
    class Counting(TensorData):
        def _load(self, split, times=1):
            loader = super()._load(split, times)
            whole = loader.dataset
            if split == "train":
                loader.dataset.__class__ = type("Counted", (type(whole),), {"__getitem__": self.count})
            return loader

        @staticmethod
        def count(dataset, position):
            loaded.append(position)
            return tuple(tensor[position] for tensor in dataset.tensors)

    loaded = []
    samples = Counting(*TRAIN, batch_size=8, val=VAL)
    report(Finetune(build_backbone(), CLASSES, optimizer=SGD), KNN(3, max_memory=7), samples)
    assert len(loaded) == len(set(loaded)) == 7


def tensors(method):
    return [tensor.clone() for tensor in (*method.parameters(), *method.buffers())]


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_looking_changes_neither_modes_nor_statistics_nor_random_numbers(batch_norm):
    method = Finetune(build_backbone(), CLASSES, batch_norm=batch_norm, **SLOW_TEACHER)
    method.train()
    modes, before, chance = [m.training for m in method.modules()], tensors(method), torch.get_rng_state()
    assert method.model.drop.training
    report(method, KNN(5))
    assert [m.training for m in method.modules()] == modes
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(one, other) for one, other in zip(before, tensors(method), strict=True))


def test_a_run_goes_on_as_if_nobody_had_looked():
    """The network has dropout."""
    states = []
    for callbacks in ([], [KNN(5)]):
        method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
        torch.manual_seed(4)
        train(method, *callbacks, epochs=3)
        states.append(method.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_reports_come_every_so_many_epochs_and_at_the_end(monkeypatch):
    seen = []
    monkeypatch.setattr(KNN, "_report", lambda _, trainer, module, stage: seen.append((stage, trainer.current_epoch)))
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    trainer = build_trainer(8, KNN(5, every_n_epochs=3), limit_val_batches=1.0)
    fit_on(trainer, method, data())
    assert seen == [("val", 2), ("val", 5), ("val", 7)]
    trainer.validate(method, datamodule=data(), verbose=False)
    trainer.test(method, datamodule=data(), verbose=False)
    assert [stage for stage, _ in seen[3:]] == ["val", "test"]


def test_a_check_of_the_validation_before_training_is_no_report(monkeypatch):
    seen = []
    monkeypatch.setattr(KNN, "_report", lambda _, trainer, module, stage: seen.append((stage, trainer.global_step)))
    trainer = build_trainer(1, KNN(5), limit_val_batches=1.0, num_sanity_val_steps=1)
    fit_on(trainer, Finetune(build_backbone(), CLASSES, optimizer=SGD), data())
    assert seen == [("val", 4)]


@NOTHING_TO_VALIDATE
def test_runs_that_could_report_nothing_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match=r"LQF trains no network.*Set callbacks=\[linear_probe\]"):
        train(LQF(build_backbone(), CLASSES, optimizer=SGD), KNN(5))
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    for callback, number, fitting in ((KNN(32), 31, 15), (KNN(5, max_memory=4), 4, 2)):
        with pytest.raises(ValueError, match=rf"memory of {number} training samples. Set callbacks.knn.k={fitting}"):
            train(method, callback)
    with pytest.raises(ValueError, match=r"there are none. Set data.val_fraction=0.1"):
        train(method, KNN(5), samples=data(val=None))
    with pytest.raises(ValueError, match=r"there are none.*trainer.limit_val_batches=1.0"):
        fit_on(build_trainer(1, KNN(5), limit_val_batches=0), method, data())


@pytest.mark.parametrize("name", ["k", "temperature", "max_memory", "every_n_epochs"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=rf"`{name}` .* got 0. Set callbacks.knn.{name}="):
        KNN(**{name: 0})


RUN = [
    "method=finetune", "method.optimizer.lr=0", "callbacks=knn",
    "data.batch_size=6", "data/augmentation=none", "trainer.max_epochs=1",
]  # fmt: skip


def test_ranks_agree_with_a_search_over_all_samples(tmp_path, folder_of_shapes):
    """Weights stay as they are, so that the accuracy at the end is that of the beginning."""
    options = [*RUN, "method.batch_norm=frozen", "callbacks.knn.k=2", "data.label_noise=0.5"]
    loaders, method = build_method(compose(*tiny_overrides(folder_of_shapes), *options, "paths.output_dir=unused"))
    sets, _ = [], method.eval()
    for loader in (loaders.fixed_train_dataloader(), loaders.val_dataloader(), loaders.test_dataloader()):
        batches = [(penultimate_features(method.backbone, b.input).double(), b.target) for b in loader]
        sets.append(tuple(torch.cat(parts).detach() for parts in zip(*batches, strict=True)))
    expected = {
        stage: brute_force(sets[0], queries, 2) for stage, queries in zip(("val", "test"), sets[1:], strict=True)
    }
    assert 0 < expected["val"] < 1

    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork"]
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        run_tiny(folder, folder_of_shapes, *options, *ranks, f"trainer.devices={world_size}")
        written = json.loads((folder / "metrics.json").read_text())
        assert {stage: written[f"{stage}/knn_acc"] for stage in expected} == pytest.approx(expected)


class Shared(TensorData):
    """Every rank has its share of the samples; shares are uneven, and may be empty."""

    def _load(self, split, times=1):
        reducer, loader = current_reducer(), super()._load(split, times)
        last = reducer.world_size - 1
        owners = (0, min(1, last), last, 0)
        batches = loader.batch_sampler.batches
        loader.batch_sampler.batches = [[p for p in rows if owners[p % 4] == reducer.rank] for rows in batches]
        return loader


@pytest.mark.parametrize("max_memory", [2, 9, 31])
def test_ranks_without_a_share_of_the_memory_take_part(max_memory):
    def look():
        method = Finetune(build_backbone(), CLASSES, **SLOW_TEACHER)
        nn.init.constant_(method.teacher.model.conv1.weight[:, :, 0], 1.0)
        return report(method, KNN(2, max_memory=max_memory), Shared(*TRAIN, batch_size=8, val=VAL))

    (alone,) = run_on_ranks(1, look)
    for world_size in (2, 3):
        assert run_on_ranks(world_size, look) == [pytest.approx(alone)] * world_size
