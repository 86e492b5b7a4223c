"""Opening models by name: what comes out answers as the model itself does."""

import re
import shutil

import pytest
import torch

from lqf_lightning.evaluate import evaluate
from lqf_lightning.references import open_reference, open_references
from lqf_lightning.teachers import EnsembleTeacher, StoredPredictions
from tiny import CLASSES, compose, run_tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder_of_shapes):
    root = tmp_path_factory.mktemp("runs")
    metrics = {}
    options = {"lqf": ["method.layers=[head]"], "moco": ["method.queue_size=24"]}
    for name in ("finetune", "lqf", "linear_probe", "moco"):
        method = [f"method={name}", *options.get(name, [])]
        metrics[name] = run_tiny(root / name, folder_of_shapes, *method, "callbacks=[]", "seed=3")
    return root, metrics


@pytest.mark.parametrize("name", ["finetune", "lqf", "moco"])
def test_a_checkpoint_answers_as_its_run_was_tested(runs, name, folder_of_shapes):
    root, metrics = runs
    model = open_reference(str(root / name / "checkpoints" / "best.ckpt"))
    from lqf_lightning.data import FolderSource, ImageDataModule

    data = ImageDataModule(FolderSource(folder_of_shapes), image_size=8, num_workers=0)  # not the model's size
    data.setup()
    batches = list(data.view_dataloader("test", model.view))
    right = torch.cat([model(batch.input).argmax(1) == batch.target for batch in batches])
    assert float(right.float().mean()) == pytest.approx(metrics[name]["test/acc"], abs=1e-6)
    assert model.classes == sorted(CLASSES)
    assert model.name == f"{name}/best"


def test_only_plain_networks_show_their_backbone(runs):
    root, _ = runs
    assert open_reference(str(root / "finetune/checkpoints/best.ckpt")).backbone is not None
    for name in ("lqf", "moco"):
        assert open_reference(str(root / name / "checkpoints" / "best.ckpt")).backbone is None, name


def test_opening_draws_no_random_numbers(runs):
    root, _ = runs
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    open_reference(str(root / "finetune/checkpoints/best.ckpt"))
    open_reference({"name": "test_resnet", "weights": None})
    assert torch.equal(torch.rand(3), expected)


def test_lists_and_patterns_are_ensembles_of_mean_outputs(runs):
    root, _ = runs
    files = [str(root / name / "checkpoints" / "best.ckpt") for name in ("finetune", "linear_probe")]
    images = torch.randn(3, 3, 32, 32)
    both, first, second = open_reference(files), open_reference(files[0]), open_reference(files[1])
    assert isinstance(both, EnsembleTeacher)
    torch.testing.assert_close(both(images), (first(images) + second(images)) / 2)
    pattern = open_reference(str(root / "*" / "checkpoints" / "best.ckpt"))
    assert len(pattern.members) == 4
    assert open_reference(files[:1]).fingerprint == first.fingerprint


def test_predictions_in_a_file_are_opened_but_not_averaged(tmp_path):
    import pandas as pd

    StoredPredictions(pd.DataFrame({"index": [0], "prediction": ["a"]}), ["a"], "x").write(tmp_path / "old.parquet")
    assert open_reference(str(tmp_path / "old.parquet")).classes == ["a"]
    with pytest.raises(ValueError, match="an ensemble cannot average"):
        open_reference([str(tmp_path / "old.parquet"), str(tmp_path / "old.parquet")])


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["n01440764", "n02084071"], "n01440764"),
        (["tench", "goldfish"], "tench"),
        (["great_white_shark", "tiger_shark"], "tench"),
    ],
)
def test_an_imagenet_classifier_calls_its_classes_as_the_folders_do(classes, expected):
    model = open_reference({"name": "test_resnet", "weights": None}, classes)
    assert model.classes[0] == expected
    assert len(set(model.classes)) == 1000
    assert set(classes) & set(model.classes)


def test_the_shell_opens_options_called_reference(runs):
    root, _ = runs
    path = root / "finetune/checkpoints/best.ckpt"
    config = compose(f"reference={path}", "++method.reference=${reference}", f"+method.references={{a: {path}}}")
    opened = open_references(config, "method")
    assert opened["reference"].fingerprint == opened["references"]["a"].fingerprint
    assert open_references(compose("++method.reference=${reference}"), "method") == {}


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("nothing/*.ckpt", ValueError, "no file matches"),
        ("nothing/best.ckpt", FileNotFoundError, "Set reference=RUN"),
        ("nothing/best", ValueError, "does not exist. Set reference=RUN"),
        ("predictions.csv", ValueError, "does not exist"),
        ("resnet50000", ValueError, "Nearest names"),
        (7, TypeError, "`reference` must be"),
        ([], ValueError, "at least one member"),
        ({"weights": None}, ValueError, "expected a `name`"),
        ({"name": "test_resnet", "weights": None, "num_classes": 7}, ValueError, "7 classes of unknown names"),
    ],
)
def test_what_cannot_be_opened_is_explained(spec, error, message):
    with pytest.raises(error, match=re.escape(message)):
        open_reference(spec)


def test_brackets_in_the_name_of_a_folder_are_no_pattern(runs, tmp_path):
    root, _ = runs
    folder = tmp_path / "[old] *run"
    shutil.copytree(root / "finetune", folder)
    expected = open_reference(str(root / "finetune/checkpoints/best.ckpt"))
    assert open_reference(str(folder / "checkpoints/best.ckpt")).fingerprint == expected.fingerprint
    with pytest.raises(ValueError, match=r"is a folder. Set reference=.*checkpoints/best.ckpt"):
        open_reference(str(folder))


def test_files_of_other_kinds_are_told_apart(tmp_path):
    (tmp_path / "old.csv").write_text("index,prediction")
    with pytest.raises(ValueError, match=r"neither a checkpoint .* nor a Parquet file"):
        open_reference(str(tmp_path / "old.csv"))


def test_a_checkpoint_that_is_open_is_not_opened_again(runs):
    root, _ = runs
    path = str(root / "finetune/checkpoints/best.ckpt")
    first = open_reference(path)
    assert open_reference([path]) is first
    (root / "finetune/checkpoints/best.ckpt").touch()
    assert open_reference(path) is not first


def test_paths_of_references_are_written_absolute(tmp_path, monkeypatch):
    from lqf_lightning.resume import make_paths_absolute

    monkeypatch.chdir(tmp_path)
    config = compose("reference=[a/best.ckpt,b/best.ckpt]")
    make_paths_absolute(config)
    assert config.reference == [f"{tmp_path}/a/best.ckpt", f"{tmp_path}/b/best.ckpt"]
    several = compose("callbacks=[negative_flips]", "callbacks.negative_flips.references={a: a/best.ckpt, b: resnet50}")
    make_paths_absolute(several)
    assert several.callbacks.negative_flips.references == {"a": f"{tmp_path}/a/best.ckpt", "b": "resnet50"}
    named = compose("reference=resnet50")
    make_paths_absolute(named)
    assert named.reference == "resnet50"


def test_a_model_is_evaluated_without_what_it_learned_from(runs, tmp_path):
    root, metrics = runs
    checkpoint = root / "finetune/checkpoints/best.ckpt"
    text = (root / "finetune" / "config.yaml").read_text()
    assert "reference: null" in text
    overrides = [f"checkpoint={checkpoint}", f"paths.output_dir={tmp_path}", "progress=none", "callbacks=[]"]
    assert evaluate(compose(*overrides, name="eval"))["test/acc"] == pytest.approx(metrics["finetune"]["test/acc"])
