import json
from functools import partial

import pytest
import torch
from lqf_lightning.callbacks import LinearProbe
from PIL import Image
from torch import nn
from torch.nn.functional import one_hot

from lqf_lightning.backbones import penultimate_features
from lqf_lightning.methods import LQF, Finetune
from lqf_lightning.train import build_method
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from tiny import compose, run_tiny, tiny_overrides

RIDGES = (1e-4, 1e-2, 1.0, 100.0)
NOTHING_TO_VALIDATE = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
OPTIONS = {"optimizer": partial(torch.optim.SGD, lr=0.5)}


def split(number, seed):
    """Classes that overlap, so that no accuracy is 0 or 1."""
    images, target = draw(number, seed)
    return images + 0.25 * (target - 1).view(-1, 1, 1, 1), target


TRAIN, VAL, TEST = split(31, 1), split(23, 2), split(29, 3)


def data(**others):
    return TensorData(*TRAIN, batch_size=8, **{"val": VAL, "test": TEST, **others})


def features(images, backbone=None):
    body = nn.Sequential(*list((backbone or build_backbone()).model)[:-1])
    return body.eval()(images).detach().double()


def refit(train, ridge):
    """Ridge regression on one-hot targets with a free intercept, as a function from features to classes."""
    x, wanted = train[0], one_hot(train[1], int(train[1].max()) + 1).double()
    centered = x - x.mean(0)
    damping = ridge * len(x) * centered.square().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(centered.T @ centered + damping, centered.T @ (wanted - wanted.mean(0)))
    return lambda rows: ((rows - x.mean(0)) @ weight + wanted.mean(0)).argmax(-1)


def brute_force(train, val, test, ridges):
    """Accuracies of the ridge that validates best, on both sets."""

    def accuracy(ridge, samples):
        return (refit(train, ridge)(samples[0]) == samples[1]).double().mean().item()

    scores = [accuracy(ridge, val) for ridge in ridges]
    best = ridges[scores.index(max(scores))]
    return {"val": max(scores), "test": accuracy(best, test)}


EXPECTED = brute_force(*((features(images), target) for images, target in (TRAIN, VAL, TEST)), RIDGES)


def train(method, *callbacks, epochs=2, samples=None, **options):
    trainer = build_trainer(epochs, *callbacks, limit_val_batches=1.0)
    fit_on(trainer, method, samples or data(), **options)
    return trainer


@pytest.mark.parametrize("build", [Finetune, LQF])
def test_it_is_the_best_ridge_regression_on_the_pre_trained_features(build):
    probe = LinearProbe(RIDGES)
    trainer = train(build(build_backbone(), CLASSES, **OPTIONS), probe)
    assert probe.accuracy == pytest.approx(EXPECTED)
    assert trainer.callback_metrics["val/linear_probe_acc"].item() == pytest.approx(EXPECTED["val"])
    (tested,) = trainer.test(trainer.lightning_module, datamodule=data(), verbose=False)
    assert tested["test/linear_probe_acc"] == pytest.approx(EXPECTED["test"])
    assert 1 / 3 < EXPECTED["val"] < 1


def test_the_choice_of_the_ridge_matters():
    """Else the tests above would not see a wrong one."""
    sets = [(features(images), target) for images, target in (TRAIN, VAL, TEST)]
    assert len({brute_force(*sets, [ridge])["val"] for ridge in RIDGES}) > 1


def test_a_resumed_run_keeps_the_result(tmp_path):
    method = Finetune(build_backbone(), CLASSES, **OPTIONS)
    first = train(method, LinearProbe(RIDGES))
    first.save_checkpoint(tmp_path / "run.ckpt")
    moved = [(features(images, method.backbone), target) for images, target in (TRAIN, VAL, TEST)]
    assert brute_force(*moved, RIDGES) != pytest.approx(EXPECTED)  # the features have changed by then

    probe = LinearProbe(RIDGES)
    again = Finetune(build_backbone(), CLASSES, **OPTIONS)
    trainer = train(again, probe, epochs=3, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.callback_metrics["val/linear_probe_acc"].item() == pytest.approx(EXPECTED["val"])
    assert probe.accuracy == pytest.approx(EXPECTED)


def test_features_that_were_trained_are_never_called_pre_trained(tmp_path):
    train(Finetune(build_backbone(), CLASSES, **OPTIONS)).save_checkpoint(tmp_path / "run.ckpt")
    probe = LinearProbe(RIDGES)
    with pytest.warns(UserWarning, match=r"no linear probe.*callbacks=\[learning_curves\]"):
        trainer = train(
            Finetune(build_backbone(), CLASSES, **OPTIONS), probe, epochs=3, ckpt_path=tmp_path / "run.ckpt",
            weights_only=True,
        )  # fmt: skip
    assert probe.accuracy == {}
    assert "val/linear_probe_acc" not in trainer.callback_metrics


@pytest.mark.parametrize(("build", "options"), [(LQF, {}), (Finetune, {"layers": ["head"]})])
def test_frozen_features_can_be_probed_late(build, options, tmp_path):
    train(build(build_backbone(), CLASSES, **OPTIONS, **options)).save_checkpoint(tmp_path / "run.ckpt")
    probe, again = LinearProbe(RIDGES), build(build_backbone(), CLASSES, **OPTIONS, **options)
    train(again, probe, epochs=3, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert probe.accuracy == pytest.approx(EXPECTED)


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_looking_changes_nothing(batch_norm):
    """Neither modes nor random numbers: the network has dropout."""
    states = []
    for callbacks in ([], [LinearProbe(RIDGES)]):
        method = Finetune(build_backbone(), CLASSES, optimizer=SGD, batch_norm=batch_norm)
        torch.manual_seed(4)
        train(method, *callbacks)
        states.append(method.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@NOTHING_TO_VALIDATE
def test_without_validation_samples_the_middle_ridge_is_tested():
    probe = LinearProbe(RIDGES)
    train(Finetune(build_backbone(), CLASSES, **OPTIONS), probe, samples=data(val=None))
    sets = [(features(images), target) for images, target in (TRAIN, TEST, TEST)]
    assert probe.accuracy == {"test": pytest.approx(brute_force(*sets, [1.0])["test"])}


@NOTHING_TO_VALIDATE
def test_without_any_held_out_samples_nothing_is_reported():
    probe = LinearProbe(RIDGES)
    train(Finetune(build_backbone(), CLASSES, **OPTIONS), probe, samples=data(val=None, test=None))
    assert probe.accuracy == {}


@pytest.fixture(scope="module")
def folder_of_noise(tmp_path_factory):
    """Pictures that hardly differ between classes, unevenly many."""
    root = tmp_path_factory.mktemp("noise")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 9), ("val", 7), ("test", 6)):
        for label, name in enumerate(("north", "south")):
            (root / part / name).mkdir(parents=True)
            for number in range(count + label):
                pixels = torch.randint(0, 200, (16, 16, 3), generator=generator) + 8 * label
                Image.fromarray(pixels.byte().numpy()).save(root / part / name / f"{number}.png")
    return root


def test_ranks_agree_with_a_refit_on_all_samples(tmp_path, folder_of_noise):
    options = [
        "method=finetune",
        "method.batch_norm=frozen",
        "callbacks=linear_probe",
        "data.batch_size=6",
        "data/augmentation=none",
    ]
    data, method = build_method(compose(*tiny_overrides(folder_of_noise), *options, "paths.output_dir=unused"))
    sets, _ = [], method.eval()
    for loader in (data.fixed_train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batches = [(penultimate_features(method.backbone, b.input).double(), b.target) for b in loader]
        sets.append(tuple(torch.cat(parts).detach() for parts in zip(*batches, strict=True)))
    expected = brute_force(*sets, [10.0**power for power in range(-6, 2)])
    assert 0 < expected["test"] < 1

    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork", "trainer.max_epochs=1"]
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        run_tiny(folder, folder_of_noise, *options, *ranks, f"trainer.devices={world_size}")
        written = json.loads((folder / "metrics.json").read_text())
        got = {stage: written[f"{stage}/linear_probe_acc"] for stage in ("val", "test")}
        assert got == pytest.approx(expected)
