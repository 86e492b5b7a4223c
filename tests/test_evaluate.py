import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from lqf_lightning.evaluate import evaluate, run_config
from tiny import compose, run_tiny, write_shapes


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder_of_shapes):
    """A finished run and its metrics."""
    folder = tmp_path_factory.mktemp("evaluated")
    options = ["method=finetune", "callbacks=[]", "data.eval_batch_size=4", "method.optimizer.lr=0.01"]
    return folder, run_tiny(folder, folder_of_shapes, *options)


def check(output, checkpoint, *overrides):
    config = compose(
        f"checkpoint={checkpoint}", "progress=none", "callbacks=[]", f"paths.output_dir={output}", *overrides,
        name="eval",
    )  # fmt: skip
    return evaluate(config)


@pytest.mark.parametrize(("split", "name"), [("test", "best"), ("val", "last")])
def test_a_checkpoint_gives_the_numbers_of_its_run(split, name, run, tmp_path):
    folder, trained = run
    got = check(tmp_path, folder / "checkpoints" / f"{name}.ckpt", f"split={split}")
    expected = {key: value for key, value in trained.items() if key.startswith(f"{split}/")}
    assert len(expected) == 6
    assert got == pytest.approx(expected)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(got)


def test_the_weights_are_those_of_the_checkpoint_and_not_of_a_library(run, tmp_path):
    folder, trained = run
    changed = shutil.copytree(folder, tmp_path / "run")
    config = OmegaConf.load(changed / "config.yaml")
    config.backbone.weights = "nowhere.safetensors"  # needed no more, whatever the run began with
    OmegaConf.save(config, changed / "config.yaml")
    got = check(tmp_path / "out", changed / "checkpoints" / "best.ckpt")
    assert got["test/loss"] == pytest.approx(trained["test/loss"])

    state = torch.load(changed / "checkpoints" / "best.ckpt", weights_only=True)
    state["state_dict"]["model.fc.bias"] += torch.tensor([100.0, 0.0, 0.0])
    torch.save(state, changed / "checkpoints" / "best.ckpt")
    got = check(tmp_path / "out", changed / "checkpoints" / "best.ckpt")
    assert (got["test/acc/blue"], got["test/acc/green"], got["test/acc/red"]) == (1.0, 0.0, 0.0)


def test_other_data_and_options_of_the_run(run, tmp_path):
    folder, trained = run
    write_shapes(tmp_path / "other" / "train", per_class=2, seed=8)
    write_shapes(tmp_path / "other" / "test", per_class=6, seed=9)
    checkpoint = folder / "checkpoints" / "best.ckpt"
    moved = check(tmp_path / "out", checkpoint, f"+data.source.root={tmp_path}/other", "+data.eval_batch_size=5")
    whole = check(tmp_path / "out", checkpoint, f"+data.source.root={tmp_path}/other")
    assert moved == pytest.approx(whole, rel=1e-5)  # batches do not matter
    assert moved["test/loss"] != pytest.approx(trained["test/loss"])
    written = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert written.data.source.root == f"{tmp_path}/other"
    assert written.method.optimizer.lr == 0.01


def test_a_whole_new_data_set_takes_the_place_of_the_runs(run, tmp_path, folder_of_shapes):
    folder, trained = run
    options = ["data=folder", f"data.source.root={folder_of_shapes}", "data.image_size=32", "data.num_workers=0"]
    got = check(tmp_path, folder / "checkpoints" / "best.ckpt", *options)
    assert got["test/loss"] == pytest.approx(trained["test/loss"], rel=1e-5)


def test_classes_of_other_names_are_refused(run, tmp_path, folder_of_shapes):
    folder, _ = run
    other = shutil.copytree(folder_of_shapes, tmp_path / "images")
    for part in ("train", "val", "test"):
        (other / part / "blue").rename(other / part / "violet")
    with pytest.raises(ValueError, match=r"'blue', 'green', 'red'.*'green', 'red', 'violet'.*data\.source\.root"):
        check(tmp_path / "out", folder / "checkpoints" / "best.ckpt", f"+data.source.root={other}")


def test_an_unknown_split_is_refused(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match=r"got 'train'\. Set split=test"):
        check(tmp_path, folder / "checkpoints" / "best.ckpt", "split=train")


def test_a_split_without_samples_is_refused(run, tmp_path, folder_of_shapes):
    folder, _ = run
    bare = shutil.copytree(folder_of_shapes, tmp_path / "images")
    shutil.rmtree(bare / "val")
    options = [f"+data.source.root={bare}", "+data.val_fraction=0", "split=val"]
    with pytest.raises(ValueError, match=r"no val samples\. Set split=test"):
        check(tmp_path / "out", folder / "checkpoints" / "best.ckpt", *options)


def test_a_missing_checkpoint_is_answered_with_those_there_are(run, tmp_path):
    folder, _ = run
    with pytest.raises(FileNotFoundError, match=r"bset\.ckpt; found \[.*best\.ckpt.*last\.ckpt.*Set checkpoint="):
        run_config(folder / "checkpoints" / "bset.ckpt")
    with pytest.raises(FileNotFoundError, match=r"none in that folder.*Set checkpoint="):
        run_config(tmp_path / "best.ckpt")


def test_a_checkpoint_outside_a_run_folder_is_refused(run, tmp_path):
    folder, _ = run
    alone = shutil.copy(folder / "checkpoints" / "best.ckpt", tmp_path / "best.ckpt")
    with pytest.raises(FileNotFoundError, match=r"lies in no run folder.*config\.yaml is missing"):
        run_config(tmp_path / alone)
