import math

import pytest
import torch
from torch.nn.functional import one_hot

from lqf_lightning.backbones import penultimate_features
from lqf_lightning.data import FolderSource, ImageDataModule
from lqf_lightning.fitted_head import RIDGES, FittedHead, core_rows, fit_head, fit_probe
from lqf_lightning.linear import Features, QuadraticProblem, RidgeProbe, held_out_accuracy
from lqf_lightning.linear.primal import leave_one_out_primal
from lqf_lightning.train import build_method
from ranks import run_on_ranks
from tiny import compose, tiny_overrides, write_shapes

CLASSES = ("a", "b", "c")


def draw(samples, features, signal, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(samples) % 3
    centers = signal * torch.randn(3, features, generator=generator, dtype=torch.float64)
    return centers[label] + torch.randn(samples, features, generator=generator, dtype=torch.float64), label


def dense_probe(rows, label, penalty):
    """Weights and intercepts of the centered normal equations; the penalty is that of the sum form."""
    target = one_hot(label, 3).double()
    centered = rows - rows.mean(0)
    matrix = centered.T @ centered + penalty * torch.eye(rows.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(matrix, centered.T @ target).T
    return weight, target.mean(0) - weight @ rows.mean(0)


def held_out_by_refits(rows, label, penalty):
    predictions = []
    for left_out in range(len(rows)):
        kept = torch.arange(len(rows)) != left_out
        weight, bias = dense_probe(rows[kept], label[kept], penalty)
        predictions.append(weight @ rows[left_out] + bias)
    return torch.stack(predictions)


def test_the_ridge_is_that_of_the_best_held_out_accuracy_by_refits():
    rows, label = draw(30, 12, 0.5)
    head = fit_probe(rows, label, CLASSES, frozenset())
    spread = rows.var(0, correction=0).mean()
    target = one_hot(label, 3).double()
    quality = {}
    for ridge in RIDGES:
        held_out = held_out_by_refits(rows, label, ridge * spread * len(rows))
        right = (held_out.argmax(1) == label).double().mean()
        quality[ridge] = (float(right), -float((held_out - target).square().sum()))
    best = max(quality, key=lambda ridge: quality[ridge])
    assert head.ridge == best
    assert head.accuracy == pytest.approx(quality[best][0], abs=1e-12)
    assert len({value[0] for value in quality.values()}) > 1  # the choice is one


def test_the_probe_is_the_ridge_probe_of_the_same_ridge():
    rows, label = draw(30, 12, 0.5, seed=1)
    head = fit_probe(rows, label, CLASSES, frozenset())
    probe = RidgeProbe(12, 3)
    probe.update(rows, label)
    (weight,), (bias,) = probe.solve([head.ridge])
    torch.testing.assert_close(head.weight, weight.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.bias, bias.float(), atol=1e-6, rtol=1e-5)


def test_logits_are_as_steep_as_held_out_predictions_are_good():
    rows, label = draw(60, 4, 0.6, seed=2)
    head = fit_probe(rows, label, CLASSES, frozenset())
    held_out = held_out_by_refits(rows, label, head.ridge * rows.var(0, correction=0).mean() * 60)
    steps = torch.linspace(0.01, 15, 3000, dtype=torch.float64)
    losses = [float(torch.nn.functional.cross_entropy(step * held_out, label)) for step in steps]
    assert head.steepness == pytest.approx(float(steps[torch.tensor(losses).argmin()]), abs=0.01)
    perfect = fit_probe(*draw(30, 4, 50.0), CLASSES, frozenset())
    assert perfect.accuracy == 1.0
    assert perfect.steepness == 15.0


def test_features_that_are_all_the_same_are_refused():
    with pytest.raises(ValueError, match=r"the same features.*Set another backbone.weights, or head=random"):
        fit_probe(torch.ones(6, 4), torch.arange(6) % 3, CLASSES, frozenset())


def held_out_accuracy_given_start(rows, label, weight, bias, ridge):
    """What leave-one-out of a linear model around the head claims, the head taken as fixed."""
    target = 15 * one_hot(label, 3).double()
    initial = 15 * (rows @ weight.T + bias)
    problem = QuadraticProblem(initial, target, ridge, intercept=True)
    return float(held_out_accuracy(leave_one_out_primal(problem, Features(rows[:, None])).prediction, target))


def accuracy_of_refits(rows, label, start, ridge):
    """The same by training again without each sample, the head (`start` of the others) included."""
    right = 0
    for left_out in range(len(rows)):
        kept = torch.arange(len(rows)) != left_out
        weight, bias = start(kept)
        target = 15 * one_hot(label[kept], 3).double() - 15 * (rows[kept] @ weight.T + bias)
        centered = rows[kept] - rows[kept].mean(0)
        matrix = centered.T @ centered + ridge * torch.eye(rows.shape[1], dtype=torch.float64)
        move = torch.linalg.solve(matrix, centered.T @ target).T
        shift = target.mean(0) - move @ rows[kept].mean(0)
        right += int(
            (15 * (weight @ rows[left_out] + bias) + move @ rows[left_out] + shift).argmax() == label[left_out]
        )
    return right / len(rows)


def test_leave_one_out_around_a_head_that_knows_the_labels_is_absurdly_good():
    rows, label = draw(36, 80, 0.0, seed=3)  # labels that nothing can tell
    ridge = 400.0
    leaking = dense_probe(rows, label, 1.0)
    claimed = held_out_accuracy_given_start(rows, label, *leaking, ridge)
    honest = accuracy_of_refits(rows, label, lambda kept: dense_probe(rows[kept], label[kept], 1.0), ridge)
    assert claimed > 0.95
    assert honest < 0.6


def test_leave_one_out_around_a_head_of_other_images_is_that_of_refits():
    rows, label = draw(36, 80, 0.4, seed=4)
    other = fit_probe(*draw(24, 80, 0.4, seed=5), CLASSES, frozenset())
    start = (other.weight.double(), other.bias.double())
    claimed = held_out_accuracy_given_start(rows, label, *start, 400.0)
    assert claimed == pytest.approx(accuracy_of_refits(rows, label, lambda kept: start, 400.0), abs=1e-12)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_shapes(root / "train", per_class=8, seed=0, extra=1)
    write_shapes(root / "test", per_class=2, seed=1)
    return root


@pytest.fixture(scope="module")
def network(images):
    options = ["method=finetune", "paths.output_dir=unused", "data.val_fraction=0"]
    backbone = build_method(compose(*tiny_overrides(images), *options))[1].backbone
    backbone.model.eval()
    return backbone


def data_of(images, backbone, **options):
    data = ImageDataModule(
        FolderSource(images), image_size=32, batch_size=6, val_fraction=0, num_workers=0,
        **{"core": {"fraction": 0.5, "seed": 0}, "part": "user"} | options,
    )  # fmt: skip
    data.setup()
    data.normalization = (backbone.mean, backbone.std)
    return data


def test_the_head_is_fitted_to_the_core_images_and_to_no_other(images, network):
    data = data_of(images, network)
    head = fit_head(network, data)
    rows = core_rows(data)
    assert not set(rows["index"]) & set(data.manifest.rows("train")["index"])
    with torch.no_grad():
        found = [
            (penultimate_features(network, batch.input).double(), batch.target)
            for batch in data.chosen_dataloader(torch.tensor(rows["index"].to_numpy()))
        ]
    features, label = (torch.cat(column) for column in zip(*found, strict=True))
    weight, bias = dense_probe(features, label, head.ridge * features.var(0, correction=0).mean() * len(rows))
    scale = float(weight.abs().max())
    torch.testing.assert_close(head.weight.double(), weight, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(head.bias.double(), bias, atol=1e-4, rtol=0)
    assert head.contents == frozenset(data.manifest.table.loc[rows["index"], "sha"])
    assert len(head.contents) == len(rows)


def test_fitting_leaves_random_numbers_and_the_network_as_they_were(images, network):
    data = data_of(images, network)
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    network.model.train()
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    fit_head(network, data)
    assert torch.equal(torch.rand(2), wanted)
    assert network.model.training
    network.model.eval()
    assert all(torch.equal(value, before[name]) for name, value in network.model.state_dict().items())


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_the_head_of_one(images, network, world):
    def fit():
        head = fit_head(network, data_of(images, network))
        return head.weight, head.bias, head.ridge, head.accuracy

    alone = fit()
    found = run_on_ranks(world, fit)
    for weight, bias, ridge, accuracy in found:
        assert torch.equal(weight, found[0][0])
        assert torch.equal(bias, found[0][1])
        torch.testing.assert_close(weight, alone[0], atol=1e-5 * float(alone[0].abs().max()), rtol=0)
        assert (ridge, accuracy) == alone[2:]


def test_a_head_is_read_as_it_was_written(tmp_path):
    head = fit_probe(*draw(12, 4, 1.0), CLASSES, frozenset({"x", "y"}))
    head.write(tmp_path / "new" / "head.safetensors")
    found = FittedHead.read(tmp_path / "new" / "head.safetensors")
    assert torch.equal(found.weight, head.weight)
    assert torch.equal(found.bias, head.bias)
    assert (found.classes, found.contents, found.ridge) == (CLASSES, head.contents, head.ridge)
    assert (found.accuracy, found.steepness) == (head.accuracy, head.steepness)


def test_other_files_are_no_heads(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="Set head=core to fit one"):
        FittedHead.read(tmp_path / "none.safetensors")
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is no fitted_head\.safetensors of a run"):
        FittedHead.read(tmp_path / "other.safetensors")


def test_a_head_goes_into_a_network_in_the_order_of_its_classes(network):
    width = network.model.get_submodule(network.head).weight[0].numel()
    head = fit_probe(*draw(12, width, 1.0), CLASSES, frozenset())
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    layer = network.model.get_submodule(network.head)
    head.put_into(network, 15.0, ["c", "a", "b"])
    torch.testing.assert_close(layer.weight, 15 * head.weight[[2, 0, 1]])
    torch.testing.assert_close(layer.bias, 15 * head.bias[[2, 0, 1]])
    head.put_into(network, None)
    torch.testing.assert_close(layer.weight, head.steepness * head.weight)
    network.model.load_state_dict(before)
    narrow = fit_probe(*draw(12, width - 1, 1.0), CLASSES, frozenset())
    with pytest.raises(ValueError, match=rf"sees {width - 1} features, .* has {width}\. Set head=core"):
        narrow.put_into(network, None)
    assert math.isfinite(head.steepness)
