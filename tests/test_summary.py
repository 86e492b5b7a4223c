import pytest
from omegaconf import OmegaConf

from lqf_lightning.summary import print_summary

CONFIG = OmegaConf.create({
    "method": {"_target_": "lqf_lightning.methods.LQF"},
    "data": {"source": {"_target_": "lqf_lightning.data.FolderSource"}},
})  # fmt: skip
METRICS = {
    "train/acc": 0.91, "train/loss": 1.5, "val/acc": 0.8, "val/loss": 2.25, "val/ece": 0.0625, "time/fit_s": 77.5,
    "val/linear_probe_acc": 0.75, "test/acc": float("nan"), "val/teacher_acc": 0.85, "val/teacher_loss": 2.125,
    "val/knn_acc": 0.5, "val/teacher_knn_acc": 0.625,
}  # fmt: skip


@pytest.fixture
def shown(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)

    def show(folder=tmp_path / "run", metrics=METRICS, checkpoints=("best", "last")):
        (folder / "checkpoints").mkdir(parents=True)
        for name in checkpoints:
            (folder / "checkpoints" / f"{name}.ckpt").touch()
        print_summary(folder, metrics, CONFIG)
        return capsys.readouterr().out

    return show


def cells(text, row):
    (line,) = [line for line in text.splitlines() if line.strip("│ ").startswith(row + " ")]
    return line.replace("│", " ").removeprefix(" ").split(row, 1)[1].split()


def test_the_table_holds_the_numbers(shown):
    text = shown()
    assert "LQF on FolderSource" in text
    assert cells(text, "train") == ["0.9100", "1.5000"]
    assert cells(text, "val") == ["0.8000", "2.2500", "0.0625"]
    assert cells(text, "test") == ["nan"]
    assert cells(text, "val, averaged teacher") == ["0.8500", "2.1250"]
    assert cells(text, "val, nearest neighbors in features") == ["0.5000"]
    assert cells(text, "val, nearest neighbors in the teacher's features") == ["0.6250"]
    assert cells(text, "val, linear probe on the same features") == ["0.7500"]
    assert "77.5" not in text


def test_it_says_where_everything_lies(shown, tmp_path):
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "confusion.png").touch()
    (folder / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    text = shown(folder)
    assert f"Run folder: {folder}" in text
    assert "pictures/confusion.png" in text
    assert f"wandb sync {folder}/wandb/offline-run-1-abc" in text


def test_a_run_that_was_online_is_not_told_to_upload(shown):
    assert "wandb sync" not in shown()


@pytest.mark.parametrize("name", ["[red]a", "callbacks=[learning_curves],seed=1", "a[/b]"])
def test_a_folder_with_brackets_is_shown_as_it_is(name, shown, tmp_path):
    folder = tmp_path / name
    text = shown(folder)
    assert f"Run folder: {folder}" in text
    assert f"{folder}/checkpoints/best.ckpt" in text


@pytest.mark.parametrize(("there", "named"), [(("best", "last"), "best"), (("last",), "last")])
def test_the_checkpoint_to_evaluate_exists(there, named, shown, tmp_path):
    text = shown(checkpoints=there)
    assert f"lqf-eval checkpoint={tmp_path}/run/checkpoints/{named}.ckpt" in text
    assert text.count("lqf-eval") == 1


def test_a_run_without_checkpoints_is_not_told_to_evaluate_one(shown):
    assert "lqf-eval" not in shown(checkpoints=())


def test_nothing_to_report_is_no_error(shown):
    assert "Run folder" in shown(metrics={"time/fit_s": 1.0})


def test_long_paths_stay_in_one_piece(shown, tmp_path):
    folder = tmp_path / ("x" * 120)
    assert f"{folder}/checkpoints/best.ckpt" in shown(folder)
