import json

import numpy as np
import pytest
import torch

from deletion.run_folders import COHORT, hits, snapshot, write_run
from lqf_lightning.data import Manifest
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.deletion import journal as journals
from lqf_lightning.deletion.certificate import write_certificate
from lqf_lightning.deletion.journal import Journal, finish_request


@pytest.fixture
def old(tmp_path, folder_of_shapes):
    """A finished run and the paths of the cohort."""
    (tmp_path / "old").mkdir()
    return tmp_path / "old", write_run(tmp_path / "old", folder_of_shapes, tmp_path / "elsewhere")


def begin(new, old, indices=COHORT):
    return Journal.begin(new, old, Cohort(torch.tensor(indices), "2 samples by name"), "before", "2026-01-01")


def complete(new, old, indices=COHORT):
    """What a scrub writes before the new model counts."""
    manifest = Manifest.read(old / "manifest.parquet")
    contents = manifest.table.loc[indices, "sha"].tolist()
    manifest.forget(np.array(indices)).write(new / "manifest.parquet")
    (new / "config.yaml").write_text("seed: 0")
    (new / "checkpoints").mkdir()
    torch.save({"state_dict": {"dw.w": torch.ones(1)}}, new / "checkpoints" / "last.ckpt")
    write_certificate(new, new / "checkpoints" / "last.ckpt", "dw.", contents, {})


def answer(new, old, indices=COHORT):
    journal = begin(new, old, indices)
    complete(new, old, indices)
    journal.scrubbed("after")
    return finish_request(new)


def test_a_request_goes_from_scrubbing_to_scrubbed_to_purged(old, tmp_path):
    (folder, paths), new = old, tmp_path / "new"
    whole = snapshot(folder)
    journal = begin(new, folder)
    assert Journal.read(new).state == "scrubbing"
    assert hits(new, paths) == []  # who is killed now leaves a folder that names no sample
    complete(new, folder)
    assert snapshot(folder) == whole  # the old model is the one in use
    journal.scrubbed("after")
    assert Journal.read(new).state == "scrubbed"
    assert Journal.read(new).pending["paths"] == paths
    assert snapshot(folder) == whole
    removed = finish_request(new)
    assert "checkpoints" in removed.deleted
    entry = json.loads((new / "forgetting.json").read_text())
    assert set(entry) == {"requests"}
    assert entry["requests"][0] | {"hashes": None} == {
        "position": 1, "date": "2026-01-01", "number": 2, "cohort": "2 samples by name", "run": "old",
        "state": "purged", "certificate": "certificate.json", "hashes": None,
    }  # fmt: skip
    assert entry["requests"][0]["hashes"]["weights_before"] == "before"
    assert entry["requests"][0]["hashes"]["weights_after"] == "after"
    (folder / "curation.json").unlink()
    assert hits(new, paths) == hits(folder, paths) == []


def test_a_purge_that_failed_is_finished_later(old, tmp_path, monkeypatch):
    (folder, _), new = old, tmp_path / "new"
    journal = begin(new, folder)
    complete(new, folder)
    journal.scrubbed("after")
    with monkeypatch.context() as patch:
        patch.setattr(journals, "purge_run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish_request(new)
    assert Journal.read(new).state == "scrubbed"
    assert finish_request(new).deleted
    assert Journal.read(new).state == "purged"
    assert finish_request(new).deleted == []  # once more does no harm


def test_a_scrub_that_was_interrupted_leaves_the_old_run_alone_and_may_start_again(old, tmp_path):
    (folder, _), new = old, tmp_path / "new"
    begin(new, folder)
    whole = snapshot(folder)
    with pytest.raises(RuntimeError, match=r"not complete \(state scrubbing\), and the old one is untouched"):
        finish_request(new)
    assert snapshot(folder) == whole
    assert len(begin(new, folder).requests) == 1


def test_a_model_that_is_not_what_its_certificate_says_does_not_count(old, tmp_path):
    (folder, _), new = old, tmp_path / "new"
    journal = begin(new, folder)
    complete(new, folder)
    torch.save({"state_dict": {"dw.w": torch.zeros(1)}}, new / "checkpoints" / "last.ckpt")
    with pytest.raises(RuntimeError, match="does not agree with its certificate: the released weights"):
        journal.scrubbed("after")
    assert Journal.read(new).state == "scrubbing"


def test_what_was_removed_is_recorded_before_the_journal_drops_the_samples(old, tmp_path):
    (folder, paths), new, seen = old, tmp_path / "new", []
    journal = begin(new, folder)
    complete(new, folder)
    journal.scrubbed("after")

    def record(removed, pending):
        seen.append((removed.deleted, pending["paths"], Journal.read(new).state))

    finish_request(new, record)
    assert len(seen) == 1
    assert "checkpoints" in seen[0][0]
    assert seen[0][1:] == (paths, "scrubbed")


def test_later_requests_inherit_the_journal(old, tmp_path):
    folders = [old[0], tmp_path / "first", tmp_path / "second"]
    answer(folders[1], folders[0])
    answer(folders[2], folders[1], [10, 12, 14])
    assert [(e["position"], e["number"], e["run"]) for e in Journal.read(folders[2]).requests] == [
        (1, 2, "old"),
        (2, 3, "first"),
    ]
    assert Manifest.read(folders[2] / "manifest.parquet").forgotten.sum() == 5
    assert Manifest.read(folders[1] / "manifest.parquet").forgotten.sum() == 5
    assert not (folders[1] / "checkpoints").exists()


def test_a_request_waits_until_the_last_is_finished(old, tmp_path):
    first = tmp_path / "first"
    journal = begin(first, old[0])
    complete(first, old[0])
    journal.scrubbed("after")
    with pytest.raises(ValueError, match=r"the last request of .*first is scrubbed, not purged"):
        begin(tmp_path / "second", first, [10])


def test_folders_that_cannot_take_a_request_are_refused(old, tmp_path):
    with pytest.raises(ValueError, match=r"is the run itself. Set hydra\.run\.dir to a new folder"):
        begin(old[0], old[0])
    answer(tmp_path / "new", old[0])
    with pytest.raises(ValueError, match=r"has answered a request already. Set hydra\.run\.dir"):
        begin(tmp_path / "new", old[0], [10])
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"holds another run, which would be lost"):
        begin(tmp_path / "other", old[0])
    with pytest.raises(RuntimeError, match="state none"):
        finish_request(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="has no request to answer"):
        Journal.read(tmp_path / "elsewhere").scrubbed("after")
