import logging

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from lqf_lightning import starting_head
from lqf_lightning.evaluate import evaluate
from lqf_lightning.fitted_head import FILE, FittedHead
from lqf_lightning.score import score
from lqf_lightning.train import build_method
from tiny import compose, run_tiny, tiny_overrides, write_shapes

FIT = ["head=core", "data.val_fraction=0.25", "callbacks=[]"]
CORE = [*FIT, "data.core={fraction: 0.5, seed: 0}"]  # 9 of 18 images that are not held out
USER = [*CORE, "data.part=user"]
LINEAR = ["method=lqf", "method.solver=kernel", "method.ridge=1.0", "method.metric=identity", "trainer.max_epochs=1"]
BRIEF = ["method=finetune", "trainer.max_epochs=1", "test=false"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_shapes(root / "train", per_class=8, seed=0)
    write_shapes(root / "test", per_class=2, seed=1)
    return root


@pytest.fixture(scope="module")
def linear_run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    run_tiny(folder, images, *USER, *LINEAR, "callbacks=[sample_information]")
    return folder


@pytest.fixture(scope="module")
def tuned_run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    run_tiny(folder, images, *USER, *BRIEF)
    return folder


def built(images, folder, *overrides):
    config = compose(*tiny_overrides(images), *overrides, f"paths.output_dir={folder}")
    return (config, *build_method(config))


def head_of(method):
    return method.backbone.model.get_submodule(method.backbone.head)


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_lqf_starts_on_the_scale_of_its_targets(images, tmp_path):
    config, data, method = built(images, tmp_path, *USER, *LINEAR)
    head = FittedHead.read(tmp_path / FILE)
    torch.testing.assert_close(head_of(method).weight, 15 * head.weight)
    torch.testing.assert_close(head_of(method).bias, 15 * head.bias)
    assert config.head == FILE
    assert data.seen_by_weights.sum() == len(head.contents) == 9
    assert not data.seen_by_weights[data.manifest.rows("train")["index"].tolist()].any()
    other = built(images, tmp_path / "other", *USER, *LINEAR, "method.target_scale=2")[2]
    torch.testing.assert_close(head_of(other).weight, 2 * head.weight)


def test_a_method_of_logits_starts_at_logits(images, tmp_path):
    method = built(images, tmp_path, *USER, *BRIEF)[2]
    head = FittedHead.read(tmp_path / FILE)
    torch.testing.assert_close(head_of(method).weight, head.steepness * head.weight)
    squared = built(images, tmp_path, *USER, *BRIEF, "method.loss=squared", "method.target_scale=3")[2]
    torch.testing.assert_close(head_of(squared).weight, 3 * head.weight)


def test_a_random_head_is_drawn_as_ever(images, tmp_path):
    weight = head_of(built(images, tmp_path, *BRIEF)[2]).weight
    assert not (tmp_path / FILE).exists()
    assert torch.equal(weight, head_of(built(images, tmp_path, *BRIEF, "head=null")[2]).weight)
    assert built(images, tmp_path, *BRIEF)[1].seen_by_weights is None


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], r"got none\. Set data\.core={fraction:0\.5,seed:0} data\.part=user"),
        (["data.core={class: red}"], r"got 6 of 1 class, expected several\. Set data\.core={fraction:0\.5"),
        (
            ["method=mixed_privacy", "data.core={fraction: 0.5}"],
            r"must not know what the run trains on, got data\.part=all\. Set data\.part=user",
        ),
        (["method=moco", "method.queue_size=12"], r"MoCo trains no classifier to start from\. Set head=random"),
    ],
)
def test_heads_that_cannot_be_fitted_are_refused(images, tmp_path, overrides, text):
    with pytest.raises(ValueError, match=text):
        built(images, tmp_path, *FIT, "method=finetune", *overrides)
    assert not (tmp_path / FILE).exists()


def test_classes_without_core_images_are_told(images, tmp_path, caplog):
    built(images, tmp_path, *FIT, *BRIEF, "data.core={classes: [red, blue]}")
    assert [text for text in said(caplog) if "data.core has no labeled image of 1 of 3 classes" in text]


def test_a_head_that_came_with_the_weights_is_not_overwritten(images, tuned_run, tmp_path):
    weights = f"backbone.weights={tuned_run}/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=r"brought a head for these classes.*Set head=random to keep that one"):
        built(images, tmp_path, *CORE, *BRIEF, weights)
    loaded = head_of(built(images, tmp_path, *BRIEF, weights, "head=random")[2]).weight
    trained = torch.load(tuned_run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["model.fc.weight"]
    assert torch.equal(loaded, trained)


def test_a_resumed_run_keeps_its_head(images, tmp_path, monkeypatch):
    run_tiny(tmp_path, images, *USER, *BRIEF)
    written = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr(starting_head, "fit_head", None)
    run_tiny(tmp_path, images, *USER, *BRIEF, "trainer.max_epochs=2")
    assert (tmp_path / FILE).read_bytes() == written
    assert OmegaConf.load(tmp_path / "config.yaml").head == FILE
    with pytest.raises(ValueError, match=r"began with a fitted head.*cannot go on with head=random\. Set head=core"):
        run_tiny(tmp_path, images, *USER, *BRIEF, "trainer.max_epochs=3", "head=random")


def test_a_run_that_starts_over_forgets_the_head_of_the_earlier_one(images, tmp_path):
    run_tiny(tmp_path, images, *USER, *BRIEF)
    options = [option for option in USER if option != "head=core"]
    run_tiny(tmp_path, images, *options, *BRIEF, "ckpt_path=null")
    assert not (tmp_path / FILE).exists()
    with pytest.raises(ValueError, match=r"began with no fitted head, which cannot go on with head=core"):
        run_tiny(tmp_path, images, *USER, *BRIEF, "trainer.max_epochs=2")


@pytest.mark.parametrize("name", ["linear_run", "tuned_run"])
def test_evaluating_fits_nothing(tmp_path, request, monkeypatch, name):
    run = request.getfixturevalue(name)
    monkeypatch.setattr(starting_head, "fit_head", None)
    moved = run.rename(run.with_name(f"{run.name}_moved"))
    try:
        options = [f"checkpoint={moved}/checkpoints/last.ckpt", "progress=none", f"paths.output_dir={tmp_path}"]
        found = evaluate(compose(*options, name="eval"))
    finally:
        moved.rename(run)
    if name == "linear_run":
        known = pd.read_json(run / "metrics.json", typ="series")
        assert found["test/acc"] == pytest.approx(known["test/acc"], abs=1e-6)
        assert found["test/loss"] == pytest.approx(known["test/loss"], rel=1e-4)


def test_scoring_a_finished_run_starts_from_its_head(tuned_run, tmp_path, monkeypatch):
    monkeypatch.setattr(starting_head, "fit_head", None)
    from lqf_lightning import finished_run

    opened = []
    monkeypatch.setattr(finished_run, "build_method", lambda run: opened.append(build_method(run)) or opened[0])
    options = ["callbacks.sample_information.influence=false", "callbacks.sample_information.kernel=last_layer"]
    options += [f"checkpoint={tuned_run}/checkpoints/last.ckpt", "progress=none", f"paths.output_dir={tmp_path}"]
    # Before the weights of the checkpoint are loaded, the method stands where the run began.
    kept = {}
    give = starting_head.give_head
    monkeypatch.setattr(
        "lqf_lightning.train.give_head",
        lambda config, backbone, data: (
            give(config, backbone, data),
            kept.update(weight=backbone.model.get_parameter("fc.weight").detach().clone()),
        )[0],
    )
    score(compose(*options, name="score"))
    head = FittedHead.read(tuned_run / FILE)
    torch.testing.assert_close(kept["weight"], head.steepness * head.weight)
    assert (tmp_path / FILE).is_file()
    assert opened[0][0].seen_by_weights.sum() == 9


def test_a_kept_head_serves_another_run(images, tuned_run, tmp_path, monkeypatch):
    monkeypatch.setattr(starting_head, "fit_head", None)
    options = ["data.val_fraction=0.25", "callbacks=[]", *LINEAR, f"head={tuned_run}/{FILE}"]
    _, data, method = built(images, tmp_path, *options)
    head = FittedHead.read(tuned_run / FILE)
    torch.testing.assert_close(head_of(method).weight, 15 * head.weight)
    assert data.seen_by_weights.sum() == 9  # of 18 that are trained on: known by content, without data.core
    with pytest.raises(FileNotFoundError, match=r"no fitted head at .*nowhere\.safetensors\. Set head=core"):
        built(images, tmp_path, *options, f"head={tmp_path}/nowhere.safetensors")


def test_sample_information_marks_what_the_head_knows(images, linear_run, tmp_path, caplog):
    table = pd.read_parquet(linear_run / "sample_information.parquet")
    assert len(table) == 9
    assert "seen_by_weights" not in table  # the core is not trained on
    run_tiny(tmp_path, images, *CORE, *LINEAR, "callbacks=[sample_information]", "test=false")
    table = pd.read_parquet(tmp_path / "sample_information.parquet")
    core = pd.read_parquet(tmp_path / "manifest.parquet").set_index("index")["core"] != ""
    assert table["seen_by_weights"].tolist() == core[table["index"]].tolist()
    assert table["seen_by_weights"].sum() == 9
    assert [text for text in said(caplog) if "leave-one-out scores are wrong for 9 of 18 samples" in text]


BOUNDS = ["callbacks=[forgetting_bounds]", "callbacks.forgetting_bounds.cohorts={some: {fraction: 0.3, seed: 0}}"]
SCRUB = ["callbacks=[scrub]", "callbacks.scrub.cohort={fraction: 0.3, seed: 0}", "callbacks.scrub.relearn=false"]


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (["callbacks=[sample_information]"], "leave-one-out scores"),
        (BOUNDS, "bounds on what the cohort some leaves behind"),
        (SCRUB, "certificates of forgetting"),
    ],
)
def test_what_rests_on_leaving_out_is_refused_where_the_head_knows_all(images, tmp_path, callback, what):
    with pytest.raises(ValueError, match=rf"{what} would be wrong for .*Set head=random.*data\.part=user"):
        run_tiny(tmp_path, images, *CORE, *LINEAR, "data.part=core", *callback)


@pytest.mark.parametrize(("callback", "file"), [(BOUNDS, "forgetting_bounds.parquet"), (SCRUB, "scrub.json")])
def test_samples_that_the_head_does_not_know_can_be_forgotten(images, tmp_path, callback, file):
    run_tiny(tmp_path, images, *USER, *LINEAR, *callback, "test=false")
    assert (tmp_path / file).is_file()


def test_groups_of_which_the_head_knows_some_are_not_scored(images, tmp_path):
    groups = ["callbacks=[sample_information]", "callbacks.sample_information.groups=class"]
    with pytest.raises(ValueError, match="scores of groups would be wrong for 9 of 18 samples"):
        run_tiny(tmp_path, images, *CORE, *LINEAR, *groups)


def test_memorization_marks_what_the_weights_know_and_refuses_where_they_know_all(images, tuned_run, tmp_path):
    callback = ["callbacks=[memorization]", "data.subset_ratio=0.7", "data.val_fraction=0.25", *BRIEF]
    callback.append("method.batch_norm=frozen")
    run_tiny(tmp_path / "some", images, f"head={tuned_run}/{FILE}", *callback)
    table = pd.read_parquet(tmp_path / "some" / "memorization_run.parquet")
    assert table["seen_by_weights"].sum() == 9
    whole = tmp_path / "whole"
    run_tiny(whole, images, "data.val_fraction=0.25", "callbacks=[]", *BRIEF)
    weights = f"backbone.weights={whole}/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="memorization scores would be wrong for 18 of 18 samples"):
        run_tiny(tmp_path / "all", images, weights, *callback)
