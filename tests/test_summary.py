import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from lqf_lightning.methods.solvers.outlook import Outlook
from lqf_lightning.summary import keep_outlook, print_summary

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


COMMAND = "backbone.weights=CORE/checkpoints/last.ckpt"


def advised(folder, *, exact=True, words=f"Leave-one-out says {'so ' * 40}much; try {COMMAND}."):
    keep_outlook(folder, SimpleNamespace(outlook=Outlook(0.8125, 0.875, exact, "nonlinear", words)))


@pytest.mark.parametrize(("exact", "named"), [(True, "LQF"), (False, "LQF by its surrogate")])
def test_what_leave_one_out_said_before_training_stands_beside_the_results(exact, named, shown, tmp_path):
    advised(tmp_path / "run", exact=exact)
    text = shown()
    assert cells(text, "leave-one-out, linear probe") == ["0.8125"]
    assert cells(text, f"leave-one-out, {named}") == ["0.8750"]
    assert ("surrogate" in text) != exact


def test_the_advice_is_wrapped_and_its_commands_stay_in_one_piece(shown, tmp_path):
    advised(tmp_path / "run")
    lines = shown().splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("Leave-one-out says")]
    assert any(COMMAND in line for line in lines[first + 1 : first + 3])
    assert all(len(line) <= 110 for line in lines[first : first + 3])
    assert first < next(number for number, line in enumerate(lines) if line.startswith("Next:"))


def test_a_method_that_gives_no_advice_leaves_that_of_the_first_start(shown, tmp_path):
    folder = tmp_path / "run"
    advised(folder, words="Try it.")
    for method in (SimpleNamespace(outlook=None), SimpleNamespace()):
        keep_outlook(folder, method)
    assert json.loads((folder / "outlook.json").read_text())["verdict"] == "nonlinear"
    assert "Try it." in shown(folder)


def test_a_run_without_advice_has_none_to_show(shown, tmp_path):
    keep_outlook(tmp_path / "run", SimpleNamespace(outlook=None))
    assert not (tmp_path / "run" / "outlook.json").exists()
    assert "leave-one-out" not in shown()
