import logging

import numpy as np
import pandas as pd
import pytest
import torch
from lqf_lightning.callbacks.sample_information import SampleInformation
from lqf_lightning.callbacks.sample_record import describe, read_scores
from PIL import Image

from lqf_lightning.methods import Finetune
from lqf_lightning.methods.solvers.tensor_folder import TensorFolder
from lqf_lightning.score import score
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from tiny import compose, run_tiny

NAME = "callbacks.sample_information"
OPTIONS = ["callbacks=[sample_information]", f"{NAME}.top=3", "test=false", "trainer.max_epochs=1"]
LQF = [*OPTIONS, "method=lqf_sgd", "method.solver=kernel", "method.ridge=0.1"]
FINETUNE = [*OPTIONS, "method=finetune", "method.batch_norm=frozen"]
PLAIN = [option for option in FINETUNE if not option.startswith(NAME)]
NUMBERS = ["suspicion", "residual", "weight_information", "function_information"]


def table_of(folder):
    return read_scores(folder / "sample_information.parquet")


@pytest.fixture(scope="module")
def linear(tmp_path_factory, folder_of_shapes):
    folder = tmp_path_factory.mktemp("linear")
    run_tiny(folder, folder_of_shapes, *LQF, f"{NAME}.groups=class", "data.label_noise=0.2")
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, folder_of_shapes):
    folder = tmp_path_factory.mktemp("tuned")
    run_tiny(folder, folder_of_shapes, *FINETUNE)
    return folder


def test_every_training_sample_is_written_once_with_its_file_and_label(linear):
    table, settings = table_of(linear)
    manifest = pd.read_parquet(linear / "manifest.parquet")
    used = manifest[(manifest["split"] == "train") & manifest["used"]]
    assert table["index"].tolist() == used["index"].tolist()
    assert table["path"].tolist() == used["path"].tolist()
    assert table["label"].tolist() == used["label"].tolist()
    assert table["class"].tolist() == used["class"].tolist()  # as the run is told, wrong ones included
    assert sorted(table["suspicion_rank"]) == list(range(1, 25))
    assert table.sort_values("suspicion_rank")["suspicion"].is_monotonic_decreasing
    assert settings["exact"]
    assert settings["information_unit"] == "nats"
    assert settings["ridge"] == pytest.approx(0.1 * 24)


def test_proposals_and_suspicion_follow_from_the_outputs_of_the_others(linear):
    table, _ = table_of(linear)
    classes = ["blue", "green", "red"]
    for row in table.to_dict("records"):
        outputs = dict(zip(classes, row["leave_one_out"], strict=True))
        own = outputs.pop(row["class"])
        assert row["margin"] == pytest.approx(max(outputs.values()) - own, abs=1e-5)
        assert (row["proposed"] != row["class"]) == (row["margin"] > 0)


def test_groups_have_a_table_of_their_own(linear):
    table = pd.read_parquet(linear / "sample_information_groups.parquet")
    assert sorted(table["group"]) == ["blue", "green", "red"]
    assert table["samples"].sum() == 24
    assert table["function_information"].is_monotonic_decreasing


@pytest.mark.parametrize("name", ["sample_information", "label_suspects", "sample_information_by_class"])
def test_pictures_are_drawn(linear, tuned, name):
    for folder in (linear, tuned):
        with Image.open(folder / "pictures" / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20  # there is something to see


def test_nothing_of_the_assembly_is_left(linear):
    assert not (linear / "sample_information_kernel").exists()


def test_training_is_not_disturbed(linear, tmp_path, folder_of_shapes, tuned):
    for options, folder in ((LQF, linear), (FINETUNE, tuned)):
        options = [option for option in options if not option.startswith(NAME)]
        noise = ["data.label_noise=0.2"] if folder == linear else []
        plain = tmp_path / folder.name
        run_tiny(plain, folder_of_shapes, *options, *noise, "callbacks=[]")
        one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (plain, folder))
        for name, value in one["state_dict"].items():
            assert torch.equal(value, other["state_dict"][name]), name


def test_fine_tuning_is_scored_at_the_time_that_its_learning_rates_add_up_to(tuned):
    table, settings = table_of(tuned)
    assert settings["kernel"] == "full"
    assert 0 < settings["time"] < 0.001 / 0.1 * 2  # two steps with momentum, warm-up and decay
    assert table["local_influence"].between(0, 10).all()
    assert table["local_influence"].nunique() > 1
    assert "leverage" not in table


def test_scores_of_fine_tuning_are_said_to_be_those_of_a_model_of_the_run(linear, tuned):
    assert [table_of(folder)[1]["twin"] for folder in (linear, tuned)] == [False, True]
    assert describe(table_of(tuned)[1]).startswith("linear model of the run, exact, at time")
    assert describe(table_of(linear)[1]).startswith("exact, at the optimum")


def test_a_run_that_moves_nothing_learns_nothing_from_any_sample(tmp_path, folder_of_shapes, caplog):
    with caplog.at_level(logging.WARNING):
        run_tiny(tmp_path, folder_of_shapes, *FINETUNE, "method.optimizer.lr=0", "method.group_lr={head:10}")
    table, settings = table_of(tmp_path)
    assert settings["time"] == 0
    for name in ("weight_information", "function_information", "memorization"):
        assert table[name].tolist() == [0.0] * 24, name  # the bias of the head has not moved either
    assert "method.group_lr={'head': 10} is left out" in caplog.text


def test_two_ranks_write_what_one_does(linear, tmp_path, folder_of_shapes):
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork", "trainer.devices=2"]
    run_tiny(tmp_path, folder_of_shapes, *LQF, *ranks, "data.label_noise=0.2")
    one, two = table_of(linear)[0], table_of(tmp_path)[0]
    assert one["index"].tolist() == two["index"].tolist()
    for name in NUMBERS:
        assert two[name].to_numpy() == pytest.approx(one[name].to_numpy(), rel=2e-3), name


def test_wandb_shows_the_ends_with_thumbnails_and_the_classes(wandb_runs, tmp_path, folder_of_shapes):
    run_tiny(tmp_path / "run", folder_of_shapes, *LQF, "logger=[wandb]", "data.label_noise=0.2")
    import wandb

    wandb.finish()
    (run,) = wandb_runs()
    table, _ = table_of(tmp_path / "run")
    shown, files = run.table("sample_information/most_informative")
    assert shown["columns"][:3] == ["image", "index", "path"]
    best = table.nlargest(3, "function_information")["index"].tolist()
    assert [row[1] for row in shown["data"]] == best
    assert all(row[0]["path"] in files for row in shown["data"])
    by_class, _ = run.table("sample_information/by_class")
    assert {row[0]: row[1] for row in by_class["data"]} == table["class"].value_counts().to_dict()
    (area,) = run.series("train/label_error_auc")
    assert 0 <= area <= 1


@pytest.mark.parametrize("fixture", ["linear", "tuned"])
def test_a_finished_run_gets_the_same_scores(fixture, request, tmp_path):
    folder = request.getfixturevalue(fixture)
    config = compose(
        f"checkpoint={folder}/checkpoints/last.ckpt", "progress=none", f"paths.output_dir={tmp_path}",
        f"{NAME}.top=3", name="score",
    )  # fmt: skip
    score(config)
    (before, then), (after, now) = table_of(folder), table_of(tmp_path)
    assert now.keys() == then.keys()
    for name, value in then.items():
        assert now[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    assert list(after) == list(before)
    for name in [*NUMBERS, *(["local_influence"] if fixture == "tuned" else [])]:
        assert after[name].to_numpy() == pytest.approx(before[name].to_numpy(), rel=1e-5), name


def test_a_finished_run_is_scored_alike_on_two_ranks(linear, tmp_path):
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork", "trainer.devices=2"]
    score(
        compose(
            f"checkpoint={linear}/checkpoints/last.ckpt", "progress=none", f"paths.output_dir={tmp_path}", *ranks,
            name="score",
        )
    )  # fmt: skip
    before, after = table_of(linear)[0], table_of(tmp_path)[0]
    assert after["index"].tolist() == before["index"].tolist()
    for name in NUMBERS:
        assert after[name].to_numpy() == pytest.approx(before[name].to_numpy(), rel=2e-3), name


def test_a_resumed_run_does_not_score_again(tmp_path, folder_of_shapes):
    run_tiny(tmp_path, folder_of_shapes, *FINETUNE)
    written = (tmp_path / "sample_information.parquet").stat().st_mtime_ns
    before = table_of(tmp_path)[0]
    options = [option for option in FINETUNE if "max_epochs" not in option]
    run_tiny(tmp_path, folder_of_shapes, *options, f"{NAME}.influence=false", "trainer.max_epochs=2")
    assert (tmp_path / "sample_information.parquet").stat().st_mtime_ns == written
    assert table_of(tmp_path)[0].equals(before)


def test_fine_tuning_that_is_resumed_without_scores_says_how_to_get_them(tmp_path, folder_of_shapes, caplog):
    run_tiny(tmp_path, folder_of_shapes, *PLAIN, "callbacks=[]")
    options = [option for option in FINETUNE if "max_epochs" not in option]
    with caplog.at_level(logging.WARNING):
        run_tiny(tmp_path, folder_of_shapes, *options, f"{NAME}.influence=false", "trainer.max_epochs=2")
    assert "lqf-score checkpoint=" in caplog.text
    assert not (tmp_path / "sample_information.parquet").exists()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([f"{NAME}.time=-1"], r"`time` must be auto, optimum or a positive number, got -1\. Set callbacks"),
        ([f"{NAME}.kernel=best"], r"got 'best'\. Set callbacks\.sample_information\.kernel=auto"),
        ([f"{NAME}.sigma=0"], r"`sigma` must be positive and finite, got 0\. Set callbacks"),
        ([f"{NAME}.top=2.5"], r"`top` must be a whole number, got 2\.5\. Set callbacks\.sample_information\.top=16"),
        ([f"{NAME}.chunk_size=0.5"], r"`chunk_size` must be a whole number, got 0\.5"),
        ([f"{NAME}.groups=nowhere.parquet"], r"no groups at .*nowhere\.parquet"),
        (["method.ridge=0", "method.solver=sgd", "method.preconditioner=null"], r"method\.ridge=0\. Set method\.ridge"),
        ([f"{NAME}.time=3", f"{NAME}.groups=class"], r"got time=3.*Set callbacks\.sample_information\.time=optimum"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_batch(overrides, text, tmp_path, folder_of_shapes):
    with pytest.raises(Exception, match=text):
        run_tiny(tmp_path, folder_of_shapes, *LQF, *overrides)
    assert not (tmp_path / "sample_information.parquet").exists()


def test_parts_of_the_kernel_of_another_run_are_refused_by_their_folder(tmp_path, folder_of_shapes):
    TensorFolder(tmp_path / "sample_information_kernel")["head:train:other"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"sample_information_kernel holds parts of the kernel of another run.*Remove"):
        run_tiny(tmp_path, folder_of_shapes, *LQF)


def test_methods_without_labels_are_refused(tmp_path, folder_of_shapes):
    options = [*OPTIONS, "method=byol", "data.batch_size=8"]
    with pytest.raises(ValueError, match=r"learns labels, lqf or finetune, got BYOL"):
        run_tiny(tmp_path, folder_of_shapes, *options)


def test_data_without_a_manifest_are_refused():
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    with pytest.raises(TypeError, match="needs an ImageDataModule"):
        fit_on(build_trainer(1, SampleInformation()), method, TensorData(*draw(9)))


def test_score_needs_a_checkpoint_or_runs(tmp_path):
    with pytest.raises(ValueError, match="expected one of them"):
        score(compose(f"paths.output_dir={tmp_path}", name="score"))


def test_a_threshold_of_memorization_is_not_taken_for_one_of_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"threshold=0\.25.*no runs\. Set threshold=null"):
        score(compose("checkpoint=x.ckpt", "threshold=0.25", f"paths.output_dir={tmp_path}", name="score"))
