import os
import signal
from pathlib import Path

import pandas as pd
import pytest

from deletion.run_folders import COHORT, hits, snapshot, write_run
from lqf_lightning.data import Manifest
from lqf_lightning.deletion import purge
from lqf_lightning.deletion.purge import purge_run
from lqf_lightning.deletion.remains import remains


@pytest.fixture
def run(tmp_path, folder_of_shapes):
    """A run folder, what it keeps elsewhere, and the paths of the cohort."""
    (tmp_path / "run").mkdir()
    return (
        tmp_path / "run",
        tmp_path / "elsewhere",
        write_run(tmp_path / "run", folder_of_shapes, tmp_path / "elsewhere"),
    )


def test_nothing_names_the_samples_afterwards(run):
    folder, _, paths = run
    assert len({name for name, _ in hits(folder, paths)}) >= 8
    before = remains(folder, COHORT, paths)
    for name in ("learning_speed.parquet", "epoch_0000", "scores.csv", "train.log", "run-1.wandb", "easiest.table.json",
                 "data_subset", "data_weights", "kernel", "best.ckpt: optimizer_states", "curation.json", "pairs",
                 "manifest.parquet"):  # fmt: skip
        assert any(name in place for place in before), name
    purge_run(folder, COHORT, paths)
    (folder / "curation.json").unlink()  # it was listed for a person to look at
    assert hits(folder, paths) == []
    assert remains(folder, COHORT, paths) == []


def test_every_file_is_deleted_filtered_or_listed(run):
    folder, outside, paths = run
    removed = purge_run(folder, COHORT, paths, keep=["own"])
    assert sorted(removed.deleted) == sorted([
        "checkpoints", "wandb", "pictures", f"kernel/{'0123' * 8}.safetensors", "kernel/model.safetensors",
        "leave_one_out.parquet", "pairs.parquet", "sample_information.parquet", "sample_information_groups.parquet",
        "train.log",
        str(outside / "kernel" / f"{'0123' * 8}.safetensors"),
    ])  # fmt: skip
    assert sorted(removed.filtered) == [
        "data_subset.parquet", "data_weights.csv", "learning_speed.parquet", "learning_speed/epoch_0000.parquet",
        "manifest.parquet", "scores.csv",
    ]  # fmt: skip
    assert [place.partition(":")[0].partition("=")[0] for place in removed.not_inspected] == [
        "data.subset", "Weights & Biases", "curation.json", "note.docx",
    ]  # fmt: skip
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"own/keep.npy", "metrics.json", "other.log", "csv/metrics.csv", "tradeoff_curve.parquet"} <= left
    assert {path.name for path in (outside / "kernel").iterdir()} == {"of_others.txt", "model.safetensors"}


def test_rows_of_other_samples_stay_as_they_were(run):
    folder, _, paths = run
    names = ("learning_speed.parquet", "learning_speed/epoch_0000.parquet", "data_subset.parquet")
    before = {name: pd.read_parquet(folder / name) for name in names}
    weights = pd.read_csv(folder / "data_weights.csv")
    manifest = Manifest.read(folder / "manifest.parquet")
    purge_run(folder, COHORT, paths)
    for name, table in before.items():
        expected = table[~table["index"].isin(COHORT)].reset_index(drop=True)
        pd.testing.assert_frame_equal(pd.read_parquet(folder / name).reset_index(drop=True), expected)
    expected = weights[~weights["path"].isin(paths)].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "data_weights.csv"), expected)
    after = Manifest.read(folder / "manifest.parquet").table
    pd.testing.assert_frame_equal(after.drop(COHORT), manifest.table.drop(COHORT))
    assert after.loc[COHORT, "removed"].all()


@pytest.mark.parametrize("form", ["json_list", "json_records", "json_columns", "txt"])
def test_copies_of_sample_files_are_filtered_in_every_form(form, run):
    folder, _, paths = run
    (folder / "data_subset.parquet").unlink()
    text, file = {
        "json_list": (f'["{paths[0]}", "train/other.png"]', folder / "data_subset.json"),
        "json_records": ('[{"index": 3}, {"index": 30}]', folder / "data_subset.json"),
        "json_columns": ('{"index": {"0": 3, "1": 30}}', folder / "data_subset.json"),
        "txt": ("3\n30\n", folder / "data_subset.txt"),
    }[form]
    file.write_text(text)
    assert remains(folder, COHORT, paths)
    assert file.name in purge_run(folder, COHORT, paths).filtered
    expected = {"json_list": '["train/other.png"]', "txt": "30\n"}.get(form, '[{"index": 30}]')
    assert file.read_text() == expected


def test_a_second_purge_finds_nothing_to_do(run):
    folder, outside, paths = run
    purge_run(folder, COHORT, paths)
    done = snapshot(folder, outside)
    again = purge_run(folder, COHORT, paths)
    assert (again.deleted, again.filtered) == ([], [])
    assert snapshot(folder, outside) == done


def test_a_purge_that_is_interrupted_anywhere_is_finished_by_another(run, monkeypatch, tmp_path, folder_of_shapes):
    class Killed(BaseException):
        pass

    folder, _, paths = run
    (tmp_path / "whole").mkdir()
    write_run(tmp_path / "whole", folder_of_shapes, tmp_path / "whole_elsewhere")
    purge_run(tmp_path / "whole", COHORT, paths)
    expected = {name.replace("/whole", "/run", 1): None for name in snapshot(tmp_path / "whole")}
    count = 0
    left = [0]

    def dying(original):
        def step(self, *arguments, **options):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return original(self, *arguments, **options)

        return step

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    while True:
        left[0] = count + 1  # each attempt does one step more than the last, and dies before the next
        try:
            purge_run(folder, COHORT, paths)
        except Killed:
            count += 1
            assert (folder / "manifest.parquet").is_file()
            for file in folder.rglob("*.parquet"):
                pd.read_parquet(file)  # none is half-written
        else:
            break
    assert count >= 4
    assert dict.fromkeys(snapshot(folder)) == expected
    monkeypatch.undo()
    (folder / "curation.json").unlink()
    assert hits(folder, paths) == []


def test_a_killed_purge_leaves_whole_files(run):
    folder, _, paths = run
    child = os.fork()
    if child == 0:
        original, steps = Path.replace, []

        def dying(self, target):
            steps.append(target)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, target)

        Path.replace = dying
        purge_run(folder, COHORT, paths)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (folder / "checkpoints").exists()
    assert not Manifest.read(folder / "manifest.parquet").forgotten.any()
    purge_run(folder, COHORT, paths)
    assert list(folder.rglob("*.partial")) == []
    (folder / "curation.json").unlink()
    assert hits(folder, paths) == []


def test_broken_and_foreign_files_are_left_to_a_person(run):
    folder, _, paths = run
    (folder / "broken.parquet").write_bytes(b"no table")
    (folder / "broken.json").write_text("{")
    (folder / "settings.yaml").write_text(f"image: {paths[0]}")
    found = dict(place.split(": ", 1) for place in purge_run(folder, COHORT, paths).not_inspected)
    assert found["broken.parquet"].startswith("cannot be read")
    assert found["broken.json"].startswith("cannot be read")
    assert found["settings.yaml"] == "names a sample of the cohort"


def test_links_out_of_the_folder_are_named_and_not_followed(run, tmp_path):
    folder, _, paths = run
    away = tmp_path / "away"
    (folder / "checkpoints").rename(away)
    (folder / "checkpoints").symlink_to(away)
    (away / "table.csv").write_text(f"index,path\n3,{paths[0]}\n")
    (folder / "table.csv").symlink_to(away / "table.csv")
    (folder / "folder").symlink_to(away)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    removed = purge_run(folder, COHORT, paths)
    assert not (folder / "checkpoints").is_symlink()
    assert (away / "last.ckpt").is_file()
    assert paths[0] in (away / "table.csv").read_text()
    listed = "\n".join(removed.not_inspected)
    assert f"{away}: checkpoints was a link to it, and only the link is deleted" in listed
    assert all(f"{name}: a link to" in listed for name in ("table.csv", "folder", "broken"))


def test_broken_files_do_not_stop_the_search_for_what_remains(run):
    folder, _, paths = run
    purge_run(folder, COHORT, paths)
    (folder / "notes.csv").write_text('a,b\n1,2,3\n"x')
    (folder / "empty.csv").write_text("")
    (folder / "broken.json").write_text("{")
    (folder / "broken.parquet").write_bytes(b"no table")
    for name in ("broken.pt", "broken.safetensors"):
        (folder / name).write_bytes(b"no tensors")
    (folder / "own.json").write_text(paths[0])
    assert remains(folder, COHORT, paths) == [
        "curation.json: an index in a list",
        "own.json: a path",
    ]


def test_what_is_no_run_folder_is_left_alone(tmp_path):
    (tmp_path / "home" / "pictures").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is no run folder.*Nothing was deleted"):
        purge_run(tmp_path / "home", COHORT, ["a"])
    assert (tmp_path / "home" / "pictures").is_dir()


def test_a_run_folder_that_is_gone_is_purged(tmp_path):
    assert purge_run(tmp_path / "gone", COHORT, ["a"]) == purge.Removed([], [], [])
