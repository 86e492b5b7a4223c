import json
import struct

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from lqf_lightning.resume import checkpoint_to_resume
from lqf_lightning.run_folder import newest_checkpoint
from lqf_lightning.train import score
from tiny import CLASSES, compose, run_tiny, tiny_overrides

WEIGHTS = "state_dict"


def weights_of(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)[WEIGHTS]


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize("method", ["finetune", "lqf", "linear_probe"])
def test_a_run_leaves_all_it_promises(method, tmp_path, folder_of_shapes):
    metrics = run_tiny(tmp_path, folder_of_shapes, f"method={method}", "logger=csv")

    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == pytest.approx(metrics)
    for stage in ("train", "val", "test"):
        assert 0 <= written[f"{stage}/acc"] <= 1
    for stage, counts in (("val", (5, 3, 3)), ("test", (5, 4, 4))):
        by_class = sum(n * written[f"{stage}/acc/{c}"] for n, c in zip(counts, CLASSES, strict=True)) / sum(counts)
        assert by_class == pytest.approx(written[f"{stage}/acc"], abs=1e-6)
        assert 0 <= written[f"{stage}/ece"] <= 1
    assert written["test/linear_probe_acc"] == 1.0  # tints are linear in the mean color

    config = OmegaConf.load(tmp_path / "config.yaml")
    assert config.method.optimizer.lr == 0.001
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    manifest = pd.read_parquet(tmp_path / "manifest.parquet")
    assert manifest.groupby("split").size().to_dict() == {"train": 24, "val": 11, "test": 13}
    for picture in ("learning_curves", "confusion"):
        assert min(png_size(tmp_path / "pictures" / f"{picture}.png")) > 300
    rows = pd.read_csv(tmp_path / "csv" / "metrics.csv")
    assert rows["val/acc"].dropna().tolist()[-1] == pytest.approx(written["val/acc"])


@pytest.mark.parametrize("method", ["finetune", "lqf_sgd"])
def test_the_same_command_gives_the_same_weights(method, tmp_path, folder_of_shapes):
    for run in ("a", "b"):
        run_tiny(tmp_path / run, folder_of_shapes, f"method={method}", "callbacks=[]")
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["finetune", "lqf_sgd"])
def test_interrupted_and_resumed_training_ends_with_the_same_weights(method, tmp_path, folder_of_shapes):
    options = (f"method={method}", "trainer.max_epochs=4", "callbacks=learning_curves", "data/augmentation=randaugment")
    run_tiny(tmp_path / "whole", folder_of_shapes, *options)
    crash = "+callbacks.crash={_target_: crash.CrashAtEpoch, epoch: 2}"
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_tiny(tmp_path / "parts", folder_of_shapes, *options, crash)
    assert newest_checkpoint(tmp_path / "parts").exists()
    run_tiny(tmp_path / "parts", folder_of_shapes, *options)

    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_a_resumed_run_keeps_its_indices_after_a_file_was_deleted(tmp_path, folder_of_shapes):
    import shutil

    root = shutil.copytree(folder_of_shapes, tmp_path / "images")
    run_tiny(tmp_path / "run", root, "method=linear_probe", "trainer.max_epochs=1", "data.batch_size=1", "callbacks=[]")
    before = pd.read_parquet(tmp_path / "run" / "manifest.parquet").set_index(["split", "path"])
    (root / "train" / "blue" / "000.png").unlink()
    run_tiny(tmp_path / "run", root, "method=linear_probe", "trainer.max_epochs=2", "data.batch_size=1", "callbacks=[]")
    after = pd.read_parquet(tmp_path / "run" / "manifest.parquet").set_index(["split", "path"])
    assert before["index"].equals(after["index"])
    assert after["removed"].sum() == 1


def test_checkpoints_hold_plain_values_only(tmp_path, folder_of_shapes):
    run_tiny(tmp_path, folder_of_shapes, "method=lqf_sgd", "callbacks=[]")
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["hyper_parameters"]["target_scale"] == 15.0


def test_training_does_not_move_the_expansion_point(tmp_path, folder_of_shapes):
    run_tiny(tmp_path, folder_of_shapes, "method=lqf_sgd", "callbacks=[]")
    state = weights_of(tmp_path)
    config = compose(*tiny_overrides(folder_of_shapes), "method=lqf_sgd", f"paths.output_dir={tmp_path}")
    from lqf_lightning.train import build_method

    _, fresh = build_method(config)
    w0 = {name: value for name, value in fresh.state_dict().items() if name.startswith("linearized.model.")}
    assert len(w0) > 20
    assert all(torch.equal(state[name], value) for name, value in w0.items())
    moved = [name for name in state if ".dw." in name and state[name].abs().max() > 0]
    assert len(moved) > 20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.optimizer.lr=inf", "training diverged"),
        ("method.layers=[stage9]", "layer groups of test_resnet"),
        ("method.group_lr={stage9: 1}", "layer groups of test_resnet"),
        ("method.loss=hinge", "method.loss=squared"),
        ("method.target_scale=-1", "method.target_scale=15"),
        ("backbone.name=test_resnett", "test_resnet"),
        ("data.batch_size=0", "data.batch_size"),
        ("method.optimizer.weight_decay=0.1", "method.ridge"),
        ("+method.rigde=1", "Did you mean `method.ridge`"),
        ("method.ridge=-1", "method.ridge"),
        ("ckpt_path=nothing.ckpt", "ckpt_path to one"),
        ("trainer.devices=0", "trainer=cpu"),
        ("trainer.max_epochs=-1", "method.scheduler=null"),
    ],
)
def test_wrong_settings_say_what_to_set(override, message, tmp_path, folder_of_shapes):
    with pytest.raises(Exception, match="(?s)" + message.replace("`", "[`]").replace(".", "[.]").replace("[.]*", ".*")):
        run_tiny(tmp_path, folder_of_shapes, "method=lqf_sgd", override)


def test_a_sweep_learns_the_objective_or_is_told_the_choices():
    assert score({"val/acc": 0.5, "val/loss": 2.0}, "val/loss") == 2.0
    with pytest.raises(ValueError, match=r"objective=val/accuracy.*'val/acc'"):
        score({"val/acc": 0.5}, "val/accuracy")


def test_nothing_has_to_be_held_out(tmp_path, folder_of_shapes):
    import shutil

    root = tmp_path / "images"
    shutil.copytree(folder_of_shapes / "train", root / "train")
    with pytest.warns(UserWarning, match=r"Total length|could not find the monitored key"):
        metrics = run_tiny(tmp_path / "run", root, "method=linear_probe", "data.val_fraction=0")
    assert {name.partition("/")[0] for name in metrics} == {"train", "time"}
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_resuming_picks_the_latest_step_whatever_the_name(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, step in (("zz", 3), ("last", 10), ("last-v1", 7)):
        torch.save({"global_step": step}, folder / f"{name}.ckpt")
    assert newest_checkpoint(tmp_path).name == "last.ckpt"
    assert newest_checkpoint(tmp_path / "elsewhere") is None


def test_an_unreadable_checkpoint_is_passed_over(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"global_step": 3, "weights": torch.zeros(1000)}, folder / "best.ckpt")
    whole = (folder / "best.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    assert newest_checkpoint(tmp_path).name == "best.ckpt"
    assert "last.ckpt cannot be read" in caplog.text


def test_a_run_of_another_method_is_not_resumed_by_accident(tmp_path, folder_of_shapes):
    short = ("trainer.max_epochs=1", "callbacks=[]")
    run_tiny(tmp_path, folder_of_shapes, "method=finetune", *short)
    with pytest.raises(ValueError, match=r"method\._target_.*ckpt_path=null"):
        run_tiny(tmp_path, folder_of_shapes, "method=lqf_sgd", *short)


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        (["method.teacher=eman"], ["method.teacher=ema_copied"], r"method\.teacher=eman"),
        (["method.teacher=eman"], ["method.teacher=eman", "method.momentum=0.5"], r"method\.momentum=0\.999"),
        (["data.labels_per_class=2"], ["data.labels_per_class=4"], r"data\.labels_per_class=2"),
    ],
)
def test_half_a_run_is_not_continued_with_another_teacher_or_other_labels(
    first, second, key, tmp_path, folder_of_shapes
):
    short = ("method=finetune", "trainer.max_epochs=1", "callbacks=[]", "test=false")
    run_tiny(tmp_path, folder_of_shapes, *short, *first)
    for how in ([], [f"ckpt_path={tmp_path}/checkpoints/last.ckpt"]):
        with pytest.raises(ValueError, match=key + ".*cannot go on.*ckpt_path=null"):
            run_tiny(tmp_path, folder_of_shapes, *short, *second, *how)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("data.copies=2", "data.copies=3"),
        ("backbone.leaky_slope=0.1", "backbone.leaky_slope=null"),
        ("backbone.pooling=both", "backbone.pooling=average"),
    ],
)
def test_half_a_run_is_not_continued_with_another_network_or_other_copies(first, second, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, tmp_path / "checkpoints" / "last.ckpt")
    OmegaConf.save(compose(first), tmp_path / "config.yaml")
    config = compose(second, f"ckpt_path={tmp_path}/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match=f"{first}, which cannot go on with .*ckpt_path=null"):
        checkpoint_to_resume(config, tmp_path)


def test_lightnings_overfitting_on_a_few_batches_is_refused(tmp_path, folder_of_shapes):
    with pytest.raises(ValueError, match=r"trainer\.limit_train_batches=2 with data\.shots=5"):
        run_tiny(tmp_path, folder_of_shapes, "method=finetune", "+trainer.overfit_batches=2")


def test_starting_over_forgets_the_earlier_results(tmp_path, folder_of_shapes):
    run_tiny(tmp_path, folder_of_shapes, "method=linear_probe", "trainer.max_epochs=1", "callbacks=[]")
    (tmp_path / "wandb_run_id").write_text("earlier")
    run_tiny(tmp_path, folder_of_shapes, "method=linear_probe", "trainer.max_epochs=1", "test=false", "ckpt_path=null")
    assert not [name for name in json.loads((tmp_path / "metrics.json").read_text()) if name.startswith("test/")]
    assert not (tmp_path / "wandb_run_id").exists()


def test_a_finished_run_started_again_reports_what_it_knows(tmp_path, folder_of_shapes):
    options = ("method=linear_probe", "trainer.max_epochs=1", "callbacks=[]")
    first = run_tiny(tmp_path, folder_of_shapes, *options)
    second = run_tiny(tmp_path, folder_of_shapes, *options)
    assert second["val/acc"] == first["val/acc"]
    assert second["time/fit_s"] > first["time/fit_s"]


def test_paths_in_the_written_configuration_are_absolute(tmp_path, folder_of_shapes, monkeypatch):
    monkeypatch.chdir(folder_of_shapes.parent)
    options = ("method=linear_probe", "trainer.max_epochs=1", "callbacks=[]", "test=false")
    run_tiny(tmp_path, folder_of_shapes.name, *options)
    assert OmegaConf.load(tmp_path / "config.yaml").data.source.root == str(folder_of_shapes)


@pytest.mark.parametrize("method", ["lqf", "finetune"])
def test_double_precision_runs(method, tmp_path, folder_of_shapes):
    metrics = run_tiny(tmp_path, folder_of_shapes, f"method={method}", "trainer.precision=64-true")
    assert metrics["test/linear_probe_acc"] == 1.0


def test_small_batches_at_the_default_rate_do_not_diverge(tmp_path, folder_of_shapes):
    options = ("method=lqf_sgd", "method.optimizer.lr=0.5", "data.batch_size=4", "trainer.max_epochs=6", "callbacks=[]")
    metrics = run_tiny(tmp_path, folder_of_shapes, *options)
    assert metrics["train/loss"] < 0.5 * 15**2  # of predicting nothing
