import json
import logging
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import wandb
from lightning import Callback
from lqf_lightning.callbacks import NegativeFlips
from PIL import Image

from lqf_lightning.data import NoAugmentation
from lqf_lightning.evaluate import evaluate
from lqf_lightning.methods import Finetune
from lqf_lightning.references import open_reference
from lqf_lightning.teachers import EnsembleTeacher, StoredPredictions, View
from methods.tensors import TensorData, build_backbone, build_trainer, draw, fit_on
from old_models import CLASSES, noise_data, old_model, outputs_of, write_noise
from tiny import compose, run_tiny

OTHER_VIEW = View(5, 0.8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
KEYS = ("nfr", "pfr", "relative_nfr", "nfi", "pfi", "error_old", "error")
NOTHING_TO_VALIDATE = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
COMMON = ["callbacks=negative_flips", "data.batch_size=6", "data/augmentation=none", "method.batch_norm=frozen"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise") / "images")


def divide(part, whole):
    return part / whole if whole else math.nan


def by_hand(old, new, true):
    """Rates from lists of class names, one sample after the other."""
    right = [(o == t, n == t) for o, n, t in zip(old, new, true, strict=True)]
    negative, positive = right.count((True, False)), right.count((False, True))
    old_right, new_right, number = sum(o for o, _ in right), sum(n for _, n in right), len(right)
    return {
        "nfr": negative / number,
        "pfr": positive / number,
        "relative_nfr": divide(negative * number, old_right * (number - new_right)),
        "nfi": divide(negative, number - new_right),
        "pfi": divide(positive, new_right),
        "error_old": 1 - old_right / number,
        "error": 1 - new_right / number,
    }


def close(expected):
    return pytest.approx(expected, abs=1e-6, nan_ok=True)


def logged(metrics, stage="val", name=""):
    return {key: float(metrics[f"{stage}/{key}{name}"]) for key in KEYS}


def names_by(model, data, split="val"):
    """What a model says about a split, by its own view, in order of index."""
    outputs, index = outputs_of(model, data.view_dataloader(split, model.view))
    return [model.classes[row] for row in outputs[index.argsort()].argmax(1).tolist()]


def truth(data, split="val"):
    return data.manifest.rows(split)["class"].tolist()


class Watch(Callback):
    """Predicts the validation set once more, and notes it beside the metrics."""

    def __init__(self):
        self.epochs, self.last = [], None

    def on_validation_end(self, trainer, pl_module):
        outputs, _ = outputs_of(pl_module, trainer.datamodule.val_dataloader())
        new = [CLASSES[row] for row in outputs.argmax(1).tolist()]
        self.epochs.append((new, {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}))
        self.last = outputs


def method(lr=0.5, seed=0):
    return Finetune(build_backbone(seed, torch.float32), CLASSES, optimizer=partial(torch.optim.SGD, lr=lr))


def fit(folder, root, *callbacks, epochs=2, data=None, seed=0, **options):
    trainer = build_trainer(epochs, *callbacks, limit_val_batches=1.0, default_root_dir=folder)
    fit_on(trainer, method(seed=seed), data or noise_data(root), **options)
    return trainer


def test_every_validation_is_compared_with_the_old_models_own_predictions(tmp_path, root):
    old, watch = old_model(view=OTHER_VIEW, classes=["cat", "ant", "bee"]), Watch()
    fit(tmp_path, root, watch, NegativeFlips(old), epochs=3)
    data = noise_data(root)
    assert len({tuple(new) for new, _ in watch.epochs}) > 1
    for new, metrics in watch.epochs:
        expected = by_hand(names_by(old, data), new, truth(data))
        assert logged(metrics) == close(expected)
        assert metrics["val/error"] == pytest.approx(1 - metrics["val/acc"])
        assert "val/flips_unshared" not in metrics
    assert expected["nfr"] > 0
    assert expected["pfr"] > 0


def any_for_the_test(data):
    return pd.DataFrame({"index": data.manifest.rows("test")["index"], "prediction": "bee"})


def test_stored_predictions_with_known_counts(tmp_path, root):
    """Chosen after the fact, so that every kind of sample comes up a known number of times."""
    watch, data = Watch(), noise_data(root)
    fit(tmp_path / "first", root, watch)
    new, true = watch.epochs[-1][0], truth(data)
    wrong = {"ant": "bee", "bee": "cat", "cat": "ant"}
    place = {
        right: [i for i, (n, t) in enumerate(zip(new, true, strict=True)) if (n == t) == right] for right in (0, 1)
    }
    old = [wrong[t] for t in true]
    for i in (*place[False][:5], *place[True][:2]):  # five break, all but two of the right ones are new
        old[i] = true[i]
    table = pd.DataFrame({"index": data.manifest.rows("val")["index"], "prediction": old})
    stored = StoredPredictions(pd.concat([table, any_for_the_test(data)]), CLASSES, "file")
    trainer = fit(tmp_path / "second", root, Watch(), NegativeFlips(stored))  # to watch draws random numbers
    number, right = len(true), len(place[True])
    expected = {
        "nfr": 5 / number, "pfr": (right - 2) / number, "nfi": 5 / (number - right), "pfi": (right - 2) / right,
        "error_old": 1 - 7 / number, "error": 1 - right / number,
        "relative_nfr": (5 / number) / ((7 / number) * (1 - right / number)),
    }  # fmt: skip
    assert logged(trainer.callback_metrics) == close(expected)
    flips = pd.read_parquet(tmp_path / "second" / "negative_flips_val.parquet")
    assert sorted(flips["index"]) == sorted(table["index"].iloc[place[False][:5]])
    assert flips["old_confidence"].isna().all()


def test_what_is_not_defined_is_nan(tmp_path, root):
    data = noise_data(root)
    true = truth(data)
    table = pd.DataFrame({"index": data.manifest.rows("val")["index"], "prediction": [t[::-1] for t in true]})
    classes = [*CLASSES, "tna", "eeb", "tac"]
    stored = StoredPredictions(pd.concat([table, any_for_the_test(data)]), classes, "never right")
    metrics = logged(fit(tmp_path, root, NegativeFlips(stored)).callback_metrics)
    assert metrics["nfr"] == metrics["nfi"] == 0
    assert metrics["error_old"] == 1
    assert math.isnan(metrics["relative_nfr"])
    summary = json.loads((tmp_path / "negative_flips.json").read_text())["val"]
    assert summary["rates"]["relative_nfr"] == {"estimate": None, "low": None, "high": None}
    assert len(pd.read_parquet(tmp_path / "negative_flips_val.parquet")) == 0
    assert (tmp_path / "pictures" / "negative_flips_val.png").exists()


def test_the_record_lists_every_flip_and_the_most_confident_mistake_first(tmp_path, root):
    old, watch = old_model(), Watch()
    fit(tmp_path, root, watch, NegativeFlips(old, max_images=2))
    data = noise_data(root)
    rows, said = data.manifest.rows("val"), names_by(old, data)
    outputs, _ = outputs_of(old, data.view_dataloader("val", old.view))
    flips = pd.read_parquet(tmp_path / "negative_flips_val.parquet")
    expected = []
    for i, (index, path, true) in enumerate(zip(rows["index"], rows["path"], rows["class"], strict=True)):
        new, sure = CLASSES[watch.last[i].argmax()], watch.last[i].softmax(0).max().item()
        if said[i] == true != new:
            expected.append((index, path, true, true, outputs[i].softmax(0).max().item(), new, sure))
    expected.sort(key=lambda row: -row[-1])
    assert len(expected) > 2
    columns = ["index", "path", "class", "old_prediction", "old_confidence", "new_prediction", "new_confidence"]
    assert list(flips) == columns
    for got, wanted in zip(flips.itertuples(index=False), expected, strict=True):
        assert tuple(got)[:4] == wanted[:4]
        assert got.new_prediction == wanted[5]
        assert (got.old_confidence, got.new_confidence) == pytest.approx((wanted[4], wanted[6]), abs=1e-5)
    summary = json.loads((tmp_path / "negative_flips.json").read_text())["val"]
    assert summary["reference"] == "old5"
    assert (summary["number"], summary["left_out"]) == (24, 0)
    assert summary["rates"]["nfr"]["estimate"] == pytest.approx(len(expected) / 24)
    by_class = pd.Series([row[2] for row in expected]).value_counts()
    for name, number in zip(CLASSES, (7, 8, 9), strict=True):
        assert summary["classes"][name]["number"] == number
        assert summary["classes"][name]["nfr"] == pytest.approx(by_class.get(name, 0) / number)


def test_classes_that_the_old_model_does_not_know_are_left_out(tmp_path, root):
    old, watch = old_model(classes=["dog", "cat", "ant"]), Watch()
    fit(tmp_path, root, watch, NegativeFlips(old))
    data, (new, metrics) = noise_data(root), watch.epochs[-1]
    known = [(o, n, t) for o, n, t in zip(names_by(old, data), new, truth(data), strict=True) if t != "bee"]
    assert logged(metrics) == close(by_hand(*zip(*known, strict=True)))
    assert metrics["val/flips_unshared"] == 8
    assert json.loads((tmp_path / "negative_flips.json").read_text())["val"]["left_out"] == 8
    assert "bee" not in set(pd.read_parquet(tmp_path / "negative_flips_val.parquet")["class"])


def test_classes_that_the_old_model_lacks_are_told_once(tmp_path, root, caplog):
    trainer = fit(tmp_path, root, NegativeFlips(old_model(classes=["dog", "cat", "ant"])))
    trainer.test(trainer.lightning_module, datamodule=noise_data(root), verbose=False)
    assert caplog.text.count("old5: the old model does not know [bee]; it knows [dog], which the data lack") == 1


def learned(folder, root, split, paths, seed=5):
    """An old model whose run trained on files of another split."""
    manifest = noise_data(root).manifest
    manifest.hash_contents()
    rows = (manifest.table["split"] == split).to_numpy()
    manifest.table["split"] = "val"
    manifest.table.loc[manifest.table.index[rows][:paths], "split"] = "train"
    manifest.write(folder / f"{split}{paths}.parquet")
    old = old_model(seed)
    old.manifest = folder / f"{split}{paths}.parquet"
    return old


class Before(Callback):
    """What has been told when the first batch begins."""

    def __init__(self, caplog):
        self.caplog, self.text = caplog, None

    def on_train_batch_start(self, *_):
        self.text = self.text or self.caplog.text


def test_images_that_an_old_model_was_trained_on_are_told_before_training(tmp_path, root, caplog):
    first, second = learned(tmp_path, root, "val", 3), learned(tmp_path, root, "test", 4, seed=6)
    before, flips = Before(caplog), NegativeFlips(references={"one": EnsembleTeacher([first, second])})
    trainer = fit(tmp_path, root, before, flips, epochs=2)
    assert before.text.count("old5 was trained on 3 of the 24 val images") == 1
    assert f"Set data.manifest={first.manifest}" in before.text
    assert before.text == caplog.text
    assert "old6" not in caplog.text
    for _ in range(2):
        trainer.test(trainer.lightning_module, datamodule=noise_data(root), verbose=False)
    assert caplog.text.count("old6 was trained on 4 of the 21 test images") == 1
    assert caplog.text.count("was trained on") == 2


def test_the_summary_says_which_model_it_is_of(tmp_path, root):
    def entry(stage):
        written = json.loads((tmp_path / "negative_flips.json").read_text())[stage]
        return {key: written[key] for key in ("epoch", "checkpoint") if key in written}

    trainer = fit(tmp_path, root, NegativeFlips(old_model()), epochs=3)
    assert entry("val") == {"epoch": 2}
    data, checkpoint = noise_data(root), tmp_path / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    trainer.test(method(), datamodule=data, verbose=False)
    assert entry("test") == {"checkpoint": None}
    trainer.test(method(), datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert entry("test") == {"checkpoint": checkpoint.name}
    trainer.validate(method(), datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert entry("val") == {"checkpoint": checkpoint.name}


def test_several_old_models_go_by_their_names(tmp_path, root):
    first, second = old_model(1), old_model(2, view=OTHER_VIEW)
    both, watch, data = EnsembleTeacher([first, second]), Watch(), noise_data(root)
    trainer = fit(tmp_path, root, watch, NegativeFlips(first, {"second": second, "both": both}))
    new, metrics = watch.epochs[-1]
    mean = sum(outputs_of(model, data.view_dataloader("val", model.view))[0] for model in (first, second))
    said = {
        "": names_by(first, data),
        "/second": names_by(second, data),
        "/both": [CLASSES[row] for row in mean.argmax(1).tolist()],
    }
    assert len({tuple(each) for each in said.values()}) == 3
    for name, old in said.items():
        assert logged(metrics, name=name) == close(by_hand(old, new, truth(data)))
    files = {path.name for path in tmp_path.glob("*.parquet")}
    assert files == {f"negative_flips_val{name}.parquet" for name in ("", "_second", "_both")}
    assert (tmp_path / "pictures" / "flip_matrix_val_both.png").exists()
    assert set(json.loads((tmp_path / "negative_flips.json").read_text())) == {"val", "val/second", "val/both"}
    assert trainer.is_global_zero


def test_looking_changes_neither_training_nor_the_old_model(tmp_path, root):
    """The network has dropout, the old one too."""
    states = []
    for number, callbacks in enumerate(([], [NegativeFlips(old_model(), cache_dir=tmp_path / "cache")])):
        torch.manual_seed(4)
        trainer = fit(tmp_path / str(number), root, *callbacks)
        states.append(trainer.lightning_module.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_the_old_model_predicts_each_split_once_and_before_the_first_batch(tmp_path, root):
    old, order, calls = old_model(), [], []
    old.model.register_forward_hook(lambda *_: calls.append(1))

    class Order(Callback):
        def on_train_start(self, *_):
            order.append(len(calls))

        def on_validation_epoch_end(self, *_):
            order.append(len(calls))

        def on_test_epoch_end(self, *_):
            order.append(len(calls))

    trainer = fit(tmp_path / "run", root, Order(), NegativeFlips(old))
    trainer.test(trainer.lightning_module, datamodule=noise_data(root), verbose=False)
    trainer.validate(trainer.lightning_module, datamodule=noise_data(root), verbose=False)
    assert order == [4, 4, 4, 8, 12]


def test_later_runs_take_the_predictions_of_earlier_ones(tmp_path, root):
    old, calls = old_model(), []
    old.model.register_forward_hook(lambda *_: calls.append(1))
    trainer = fit(tmp_path / "one", root, NegativeFlips(old, cache_dir=tmp_path / "cache"))
    assert len(calls) == 4
    again = fit(tmp_path / "two", root, NegativeFlips(old, cache_dir=tmp_path / "cache"))
    again.validate(again.lightning_module, datamodule=noise_data(root), verbose=False)
    assert len(calls) == 4
    assert logged(again.callback_metrics) == logged(trainer.callback_metrics)


def test_a_sanity_check_leaves_no_record(tmp_path, root):
    trainer = build_trainer(
        1, NegativeFlips(old_model()), limit_val_batches=1.0, num_sanity_val_steps=1, check_val_every_n_epoch=2,
        default_root_dir=tmp_path,
    )  # fmt: skip
    fit_on(trainer, method(), noise_data(root))
    assert list(tmp_path.iterdir()) == []


@NOTHING_TO_VALIDATE
def test_without_validation_samples_the_test_alone_is_compared(tmp_path, root, caplog):
    data = noise_data(root)
    table = data.manifest.table
    table.loc[table["split"] == "val", "used"] = False
    old = old_model()
    with caplog.at_level(logging.INFO):
        trainer = fit(tmp_path, root, NegativeFlips(old), data=data)
    assert caplog.text.count("counted in the test only") == 1
    assert not any("nfr" in name for name in trainer.callback_metrics)
    (tested,) = trainer.test(trainer.lightning_module, datamodule=data, verbose=False)
    outputs, _ = outputs_of(trainer.lightning_module, data.test_dataloader())
    new = [CLASSES[row] for row in outputs.argmax(1).tolist()]
    assert logged(tested, "test") == close(by_hand(names_by(old, data, "test"), new, truth(data, "test")))
    assert len(new) == 21


def test_a_model_to_compare_with_must_be_given():
    with pytest.raises(ValueError, match=r"Set reference=RUN/checkpoints/best\.ckpt"):
        NegativeFlips()
    with pytest.raises(ValueError, match=r"called \['a/b'\].*Set callbacks\.negative_flips\.references"):
        NegativeFlips(references={"a/b": old_model()})
    with pytest.raises(ValueError, match=r"got -1\. Set callbacks\.negative_flips\.max_images=32"):
        NegativeFlips(old_model(), max_images=-1)


@pytest.mark.parametrize("val", [True, False])
@NOTHING_TO_VALIDATE
def test_strangers_are_refused_before_anything_is_computed(tmp_path, root, val):
    data = noise_data(root)
    data.manifest.table.loc[data.manifest.table["split"] == "val", "used"] = val
    old, calls = old_model(classes=["x", "y", "z"]), []
    old.model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"\[ant, bee, cat\].*\[x, y, z\] share no name"):
        fit(tmp_path, root, NegativeFlips(old), data=data)
    assert calls == []


def test_data_without_a_manifest_are_refused(tmp_path, root):
    data = TensorData(*draw(6, dtype=torch.float32), batch_size=6)
    with pytest.raises(TypeError, match=r"need an ImageDataModule.*TensorData.*Set data=folder"):
        fit(tmp_path, root, NegativeFlips(old_model()), data=data)


def stored_for(data, *splits):
    data.manifest.hash_contents()
    rows = pd.concat([data.manifest.rows(split) for split in splits])
    return StoredPredictions(rows[["index", "class", "sha"]].rename(columns={"class": "prediction"}), CLASSES, "file")


def test_stored_predictions_must_cover_what_is_evaluated(tmp_path, root):
    data = noise_data(root)
    with pytest.raises(ValueError, match="file has no prediction for 24 of 24 val samples"):
        fit(tmp_path, root, NegativeFlips(stored_for(data, "test")))
    with pytest.warns(UserWarning, match=r"a test would fail, set test=false.*21 of 21 test samples"):
        trainer = fit(tmp_path, root, NegativeFlips(stored_for(data, "val")))
    with pytest.raises(ValueError, match="21 of 21 test samples"):
        trainer.test(trainer.lightning_module, datamodule=data, verbose=False)


def test_stored_predictions_of_changed_images_are_refused(tmp_path, root):
    changed = shutil.copytree(root, tmp_path / "images")
    stored = stored_for(noise_data(root), "val", "test")
    Image.new("RGB", (8, 8)).save(changed / "val" / "bee" / "3.png")
    with pytest.raises(ValueError, match=r"1 of 24 val samples have changed.*Set data\.manifest"):
        fit(tmp_path / "run", changed, NegativeFlips(stored))


def test_a_fresh_run_forgets_the_summary_of_the_one_before(tmp_path, root):
    tmp_path.joinpath("negative_flips.json").write_text(json.dumps({"test": {}}))
    fit(tmp_path, root, NegativeFlips(old_model()))
    assert set(json.loads((tmp_path / "negative_flips.json").read_text())) == {"val"}


@pytest.fixture(scope="module")
def upgrade(tmp_path_factory, root):
    """An old model, and two that were to replace it, as the commands make them."""
    folder = tmp_path_factory.mktemp("upgrade")
    # Noise is learned by heart at best: two epochs leave all three models wrong in their own ways.
    run_tiny(folder / "old", root, "method=finetune", *COMMON[1:], "callbacks=[]", "data.image_size=24", "seed=1")
    options = [*COMMON, f"reference={folder}/old/checkpoints/best.ckpt", f"paths.data_dir={folder}/data"]
    metrics = {
        "finetune": run_tiny(folder / "finetune", root, "method=finetune", *options, "method.optimizer.lr=0.05"),
        "lqf": run_tiny(folder / "lqf", root, "method=lqf_sgd", *[o for o in options if "batch_norm" not in o]),
    }
    return folder, metrics


def check(output, checkpoint, *overrides):
    options = [f"checkpoint={checkpoint}", "progress=none", f"paths.output_dir={output}"]
    return evaluate(compose(*options, *overrides, name="eval"))


@pytest.mark.parametrize("name", ["finetune", "lqf"])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_run_reports_what_two_evaluations_say(stage, name, upgrade, root, tmp_path):
    folder, metrics = upgrade
    old, new = (open_reference(str(folder / run / "checkpoints" / "best.ckpt")) for run in ("old", name))
    data = noise_data(root)
    said = [names_by(model, data, stage) for model in (old, new)]
    expected = by_hand(*said, truth(data, stage))
    if stage == "test":  # of the best checkpoint; validation was of the last
        assert logged(metrics[name], stage) == close(expected)
    options = ["callbacks=[negative_flips]", f"split={stage}", f"paths.data_dir={folder}/data"]
    checkpoint, reference = (folder / run / "checkpoints" / "best.ckpt" for run in (name, "old"))
    got = check(tmp_path / "new", checkpoint, f"reference={reference}", *options)
    assert logged(got, stage) == close(expected)
    alone = check(tmp_path / "old", reference, "callbacks=[]", f"split={stage}")
    assert got[f"{stage}/error_old"] == pytest.approx(1 - alone[f"{stage}/acc"], abs=1e-6)
    assert got[f"{stage}/error"] == pytest.approx(1 - got[f"{stage}/acc"], abs=1e-6)
    flips = pd.read_parquet(tmp_path / "new" / f"negative_flips_{stage}.parquet")
    assert len(flips) == round(expected["nfr"] * len(said[0]))
    assert (tmp_path / "new" / "pictures" / f"flip_matrix_{stage}.png").exists()


def test_runs_of_one_old_model_share_its_predictions(upgrade):
    folder, _ = upgrade
    assert len(list((folder / "data" / "reference_predictions").iterdir())) == 2  # val and test


def test_a_resumed_run_goes_on_comparing(tmp_path, root, upgrade):
    folder, _ = upgrade
    options = [*COMMON, "method=finetune", f"reference={folder}/old/checkpoints/best.ckpt"]
    options += ["callbacks.negative_flips.cache_dir=null", "method.scheduler=null", "method.optimizer.lr=0.05"]
    whole = run_tiny(tmp_path / "whole", root, *options)
    run_tiny(tmp_path / "parts", root, *options, "trainer.max_epochs=1")
    parts = run_tiny(tmp_path / "parts", root, *options)
    assert logged(parts) == close(logged(whole))
    first, second = (json.loads((tmp_path / run / "negative_flips.json").read_text()) for run in ("whole", "parts"))
    assert first == second
    assert set(first) == {"val", "test"}
    assert run_tiny(tmp_path / "parts", root, *options)["val/nfr"] == parts["val/nfr"]  # nothing left to do
    assert json.loads((tmp_path / "parts" / "negative_flips.json").read_text()) == first


def test_any_number_of_ranks_counts_every_sample_once(tmp_path, root, upgrade):
    folder, _ = upgrade
    options = [*COMMON, "method=finetune", f"reference={folder}/old/checkpoints/best.ckpt", "trainer.max_epochs=1"]
    options += ["data.drop_last=true"]  # a last step of training might repeat samples
    options += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork", "method.optimizer.lr=0.05"]
    results = []
    for world_size in (1, 2, 3):
        run = tmp_path / str(world_size)
        run_tiny(run, root, *options, f"trainer.devices={world_size}", f"paths.data_dir={run}/data")
        metrics = json.loads((run / "metrics.json").read_text())
        flips = pd.read_parquet(run / "negative_flips_test.parquet")
        summary = json.loads((run / "negative_flips.json").read_text())
        results.append((logged(metrics), logged(metrics, "test"), summary, flips.round(4).sort_values("index")))
        assert flips["index"].is_unique
        assert len(flips) == round(metrics["test/nfr"] * 21) > 0
        assert len(list((run / "data" / "reference_predictions").iterdir())) == 2
    for val, test, summary, flips in results[1:]:
        assert val == close(results[0][0])
        assert test == close(results[0][1])
        assert summary == results[0][2]
        pd.testing.assert_frame_equal(
            flips.reset_index(drop=True), results[0][3].reset_index(drop=True), atol=2e-4, rtol=0
        )


def test_wandb_shows_flipped_images_and_classes(tmp_path, root, upgrade, wandb_runs):
    folder, _ = upgrade
    options = [*COMMON, "method=finetune", f"reference={folder}/old/checkpoints/best.ckpt", "logger=wandb"]
    options += ["callbacks.negative_flips.max_images=3", "method.optimizer.lr=0.05", f"paths.data_dir={folder}/data"]
    metrics = run_tiny(tmp_path / "run", root, *options)
    wandb.finish()
    (run,) = wandb_runs()
    assert run.series("val/nfr")[-1] == pytest.approx(metrics["val/nfr"])
    assert run.series("test/nfr") == [pytest.approx(metrics["test/nfr"])]
    for stage in ("val", "test"):
        flips = pd.read_parquet(tmp_path / "run" / f"negative_flips_{stage}.parquet")
        table, files = run.table(f"{stage}/negative_flips")
        assert len(run.series(f"{stage}/negative_flips/_type")) == 1
        assert table["columns"] == ["image", *flips]
        assert len(table["data"]) == min(3, len(flips)) > 0
        for row, (_, flip) in zip(table["data"], flips.iterrows(), strict=False):
            assert row[1:4] == [flip["index"], flip["path"], flip["class"]]
            shown = np.asarray(Image.open(files[row[0]["path"]]).convert("RGB"), dtype=int)
            own = np.asarray(NoAugmentation(32, 0.875)(Image.open(root / flip["path"])), dtype=int)
            assert shown.shape == own.shape == (32, 32, 3)
            assert np.abs(shown - own).max() <= 1
        classes, _ = run.table(f"{stage}/negative_flips_by_class")
        assert [row[0] for row in classes["data"]] == CLASSES
        assert run.picture(f"pictures/negative_flips_{stage}").exists()


def test_the_batch_hook_waits_for_nothing(root):
    """Neither the disk nor the old model is asked between batches."""
    callback, batch = NegativeFlips(old_model()), SimpleNamespace(index=torch.tensor([4]), target=torch.tensor([1]))
    callback.on_validation_batch_end(None, None, {"logits": torch.tensor([[0.0, 1.0, 3.0]]).bfloat16()}, batch, 0)
    ((index, target, prediction, confidence),) = callback._seen
    assert (index.item(), target.item(), prediction.item()) == (4, 1, 2)
    assert confidence.item() == pytest.approx(torch.tensor([0.0, 1.0, 3.0]).softmax(0)[2].item())


@pytest.mark.gpu
def test_the_batch_hook_never_synchronizes():
    callback = NegativeFlips(old_model())
    logits = torch.randn(8, 3, device="cuda")
    batch = SimpleNamespace(index=torch.arange(8, device="cuda"), target=torch.zeros(8, device="cuda").long())
    torch.cuda.set_sync_debug_mode("error")
    try:
        callback.on_validation_batch_end(None, None, {"logits": logits}, batch, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gpu_under_nccl_says_what_the_cpu_says(precision, tmp_path, root, upgrade, console):
    folder, _ = upgrade
    reference = folder / "old" / "checkpoints" / "best.ckpt"
    options = [f"checkpoint={folder}/finetune/checkpoints/best.ckpt", f"reference={reference}", "progress=none"]
    options += ["callbacks=[negative_flips]", "trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=1"]
    options += [f"trainer.precision={precision}", f"hydra.run.dir={tmp_path}/gpu"]
    console("lqf-eval", *options, env={"CUDA_VISIBLE_DEVICES": "0"})
    got = json.loads((tmp_path / "gpu" / "metrics.json").read_text())
    data = noise_data(root)
    old, new = (open_reference(str(folder / run / "checkpoints" / "best.ckpt")) for run in ("old", "finetune"))
    expected = by_hand(names_by(old, data, "test"), names_by(new, data, "test"), truth(data, "test"))
    assert got["test/error_old"] == pytest.approx(expected["error_old"], abs=1e-6)  # single precision in any case
    if precision == "32-true":
        assert logged(got, "test") == close(expected)
