import shutil

import pytest
import torch
from omegaconf import OmegaConf

from lqf_lightning.backbones import create_backbone
from lqf_lightning.comparison.average_plan import plan_averages
from lqf_lightning.comparison.inputs import networks_of, open_data, open_side
from lqf_lightning.comparison.predictions import predict
from lqf_lightning.comparison.weight_averages import WeightAverages
from lqf_lightning.data import ImageDataModule
from lqf_lightning.references import open_reference
from tiny import compose, run_tiny

CPU = torch.device("cpu")
OPTIONS = ["method=finetune", "callbacks=[]", "test=false", "trainer.max_epochs=1", "data.batch_size=6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder_of_shapes):
    """An old run of two of the classes, in other order by name, and two new ones of all three."""
    root = tmp_path_factory.mktemp("averaged")
    two = shutil.copytree(folder_of_shapes, root / "two")
    for part in ("train", "val", "test"):
        shutil.rmtree(two / part / "blue")
    run_tiny(root / "two_classes", two, *OPTIONS, "method.optimizer.lr=0.05")
    run_tiny(root / "old", folder_of_shapes, *OPTIONS, "method.optimizer.lr=0.02")
    start = f"backbone.weights={root}/old/checkpoints/last.ckpt"
    for seed in (1, 2):
        run_tiny(root / f"new{seed}", folder_of_shapes, *OPTIONS, start, f"seed={seed}", "method.optimizer.lr=0.05")
    run_tiny(root / "frozen", folder_of_shapes, *OPTIONS, start, "method.batch_norm=frozen")
    run_tiny(root / "leaky", folder_of_shapes, *OPTIONS, "backbone.leaky_slope=0.1")
    names = ("old", "two_classes", "new1", "new2", "frozen", "leaky")
    return {name: root / name / "checkpoints" / "last.ckpt" for name in names}


@pytest.fixture
def data(runs):
    _, data = open_data(compose(f"old={runs['old']}", f"new={runs['new1']}", name="compare"))
    return data


def averages(runs, data: ImageDataModule, old="old", new=("new1",), **options):
    opened = [open_reference(str(runs[name])) for name in (old, *new)]
    return WeightAverages(opened[0], opened[1:], opened[1].classes, data, CPU, **options), opened


def outputs(teacher, data, split="val"):
    (stored,) = predict([teacher], data, [split], CPU)
    return stored.look_up(torch.tensor(stored.table["index"].to_numpy()))


@pytest.mark.parametrize("kind", ["bcwi", "fisher"])
@pytest.mark.parametrize("batch_norm", ["reestimate", "average"])
def test_the_ends_are_the_models_themselves(kind, batch_norm, runs, data):
    between, (old, new) = averages(runs, data, batch_norm=batch_norm, fisher_samples=4)
    assert torch.equal(outputs(between.teacher(kind, 0.0), data), outputs(new, data))
    assert torch.equal(outputs(between.teacher(kind, 1.0), data), outputs(old, data))
    assert between.teacher(kind, 1.0).view == new.view
    assert not torch.equal(outputs(between.teacher(kind, 0.5), data), outputs(new, data))


def test_weights_between_are_interpolated_and_statistics_are_those_of_the_training_images(runs, data):
    between, (old, new) = averages(runs, data, batch_norm="reestimate")
    network = between.teacher("bcwi", 0.25).backbone.model
    states = [teacher.backbone.model.state_dict() for teacher in (old, new)]
    name = "conv1.0.weight"
    expected = 0.25 * states[0][name].double() + 0.75 * states[1][name].double()
    torch.testing.assert_close(network.state_dict()[name], expected.float(), rtol=0, atol=1e-7)

    images = torch.cat([batch.input for batch in data.view_dataloader("train", between.view)])
    first = network.conv1[0](images).double()  # no normalization before it: exact
    torch.testing.assert_close(network.conv1[1].running_mean.double(), first.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        network.conv1[1].running_var.double(), first.transpose(0, 1).flatten(1).var(1), rtol=1e-5, atol=0
    )

    averaged, _ = averages(runs, data, batch_norm="average")
    state = averaged.teacher("bcwi", 0.25).backbone.model.state_dict()
    mean = 0.25 * states[0]["conv1.1.running_mean"] + 0.75 * states[1]["conv1.1.running_mean"]
    torch.testing.assert_close(state["conv1.1.running_mean"], mean)
    assert not torch.allclose(state["conv1.1.running_mean"], network.conv1[1].running_mean, rtol=1e-2)


def test_statistics_are_the_same_whatever_the_number_of_images_per_batch(runs, data):
    between, _ = averages(runs, data)
    first = between.teacher("bcwi", 0.5).backbone.model.state_dict()["conv1.1.running_var"].clone()
    data.eval_batch_size = 5
    again = between.teacher("bcwi", 0.5).backbone.model.state_dict()["conv1.1.running_var"]
    torch.testing.assert_close(first, again)
    few, _ = averages(runs, data, batch_norm_samples=4)
    assert not torch.allclose(
        few.teacher("bcwi", 0.5).backbone.model.state_dict()["conv1.1.running_var"], first, rtol=1e-3
    )


def test_networks_with_the_same_statistics_keep_them(runs, data):
    between, (old, _) = averages(runs, data, new=("frozen",))
    assert not between.reestimates
    state = between.teacher("bcwi", 0.5).backbone.model.state_dict()
    assert torch.equal(state["conv1.1.running_var"], old.backbone.model.state_dict()["conv1.1.running_var"])


def test_statistics_of_the_ends_can_be_estimated_too(runs, data):
    between, (_, new) = averages(runs, data)
    assert not torch.equal(outputs(between.teacher("bcwi", 0.0, ends=True), data), outputs(new, data))


def test_rows_of_classes_that_only_the_new_model_knows_are_its_own(runs, data):
    between, (old, new) = averages(runs, data, old="two_classes", fisher_samples=4)
    head = old.backbone.head
    for kind in ("bcwi", "fisher"):
        for share in (0.5, 1.0):
            weight = between.teacher(kind, share).backbone.model.get_submodule(head).weight
            theirs = new.backbone.model.get_submodule(head).weight
            torch.testing.assert_close(weight[new.classes.index("blue")], theirs[new.classes.index("blue")])
    weight = between.teacher("bcwi", 1.0).backbone.model.get_submodule(head).weight
    mine = old.backbone.model.get_submodule(head).weight
    for name in ("green", "red"):
        assert torch.equal(weight[new.classes.index(name)], mine[old.classes.index(name)])


def test_a_soup_is_the_mean_of_the_new_networks(runs, data):
    between, (_, first, second) = averages(runs, data, new=("new1", "new2"), batch_norm="average")
    state = between.teacher("soup", 0.0).backbone.model.state_dict()
    mean = (first.backbone.model.state_dict()["fc.weight"] + second.backbone.model.state_dict()["fc.weight"]) / 2
    torch.testing.assert_close(state["fc.weight"], mean)
    reestimated, _ = averages(runs, data, new=("new1", "new2"))
    soup = reestimated.teacher("soup", 0.0).backbone.model.state_dict()
    assert not torch.allclose(soup["conv1.1.running_mean"], state["conv1.1.running_mean"], rtol=1e-2)


def test_training_images_are_drawn_by_the_seed(runs, data):
    between, _ = averages(runs, data, batch_norm_samples=6)
    first = between.teacher("bcwi", 0.5).fingerprint
    assert between.teacher("bcwi", 0.5).fingerprint == first
    other, _ = averages(runs, data, batch_norm_samples=6, seed=1)
    assert other.teacher("bcwi", 0.5).fingerprint != first


def planned(runs, old, new, *overrides):
    config = compose(f"old={runs[old]}", f"new={new}", *overrides, name="compare")
    _, data = open_data(config)
    return plan_averages(config, open_side(config, "old", data.classes), open_side(config, "new", data.classes), data)


def test_averages_are_planned_by_what_the_models_are(runs):
    both = f"[{runs['new1']},{runs['new2']}]"
    assert planned(runs, "old", runs["new1"]) == (["bcwi"], "")
    assert planned(runs, "two_classes", runs["new1"]) == (["bcwi"], "")
    assert planned(runs, "old", both) == (["soup"], "")
    assert planned(runs, "old", runs["new1"], "averages=[bcwi,fisher]") == (["bcwi", "fisher"], "")
    assert planned(runs, "old", runs["new1"], "averages=null") == ([], "they were not asked for (averages=null)")
    with pytest.raises(ValueError, match=r"need one new model, but new names 2 models\. Set averages=\[soup\]"):
        planned(runs, "old", both, "averages=[fisher]")


def test_networks_that_compute_otherwise_with_the_same_weights_are_not_averaged(runs):
    kinds, reason = planned(runs, "old", runs["leaky"])
    assert (kinds, reason) == ([], "the models differ in backbone.leaky_slope: None and 0.1")
    with pytest.raises(
        ValueError, match=r"not possible: the models differ in backbone\.leaky_slope.*Set averages=null"
    ):
        planned(runs, "old", runs["leaky"], "averages=[bcwi]")


@pytest.mark.parametrize(("option", "value", "was"), [("image_size", 48, 32), ("crop_fraction", 0.5, 0.875)])
def test_networks_that_want_other_images_make_no_soup(option, value, was, runs, tmp_path):
    folder = shutil.copytree(runs["new2"].parent.parent, tmp_path / "other")
    config = OmegaConf.load(folder / "config.yaml")
    config.data[option] = value
    OmegaConf.save(config, folder / "config.yaml")
    other = folder / "checkpoints" / "last.ckpt"
    reason = f"the models differ in data.{option}: {was} and {value}"
    assert planned(runs, "old", f"[{runs['new1']},{other}]") == ([], reason)
    assert planned(runs, "old", other) == (["bcwi"], "")  # with images as the new network wants them


def test_the_first_checkpoint_comes_first_among_new_networks(runs):
    for names in (("new1", "new2"), ("new2", "new1")):
        config = compose("old=resnet18", f"new=[{','.join(str(runs[name]) for name in names)}]", name="compare")
        networks = networks_of(open_side(config, "new", ["blue", "green", "red"]))
        assert [n.fingerprint for n in networks] == [open_reference(str(runs[name])).fingerprint for name in names]


def test_a_run_can_start_from_the_weights_of_another(runs):
    stored = torch.load(runs["old"], weights_only=True)["state_dict"]
    backbone = create_backbone("test_resnet", 3, library="timm", weights=runs["old"])
    for name, entry in backbone.model.state_dict().items():  # the head too, as there are as many classes
        assert torch.equal(entry, stored[f"model.{name}"]), name
