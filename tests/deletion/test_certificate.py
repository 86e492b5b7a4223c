import json
from hashlib import sha256

import numpy as np
import pytest
import torch

from deletion.run_folders import COHORT, write_run
from lqf_lightning.data import Manifest
from lqf_lightning.deletion.certificate import is_about, read_certificate, verify_certificate, write_certificate
from lqf_lightning.deletion.content_hash import cohort_hash, tensors_hash

STATE = {"dw.w": torch.tensor([1.0, 2.0]), "dw.b": torch.zeros(1), "model.w": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def certified(tmp_path, folder_of_shapes):
    """A folder with a certificate, the contents of the cohort, and the receipt."""
    folder = tmp_path / "new"
    folder.mkdir()
    write_run(folder, folder_of_shapes, tmp_path / "elsewhere")
    manifest = Manifest.read(folder / "manifest.parquet")
    contents = manifest.table.loc[COHORT, "sha"].tolist()
    manifest.forget(np.array(COHORT)).write(folder / "manifest.parquet")
    (folder / "report.json").write_text("{}")
    save(folder, STATE)
    receipt = write_certificate(folder, folder / "new.ckpt", "dw.", contents, {"bound": {"nats": 0.02}, "date": "d"})
    return folder, contents, receipt


def save(folder, state):
    torch.save({"state_dict": state, "epoch": 1}, folder / "new.ckpt")


def test_an_untouched_folder_agrees_with_its_certificate(certified):
    folder, _, _ = certified
    assert verify_certificate(folder) == []
    stated = read_certificate(folder)
    assert stated["statement"] == {"bound": {"nats": 0.02}, "date": "d"}
    assert stated["cohort"]["number"] == 2
    assert stated["weights"] == {
        "released": tensors_hash({"dw.w": STATE["dw.w"], "dw.b": STATE["dw.b"]}),
        "base": tensors_hash({"model.w": STATE["model.w"]}),
    }


def test_the_hash_is_of_names_types_shapes_and_bytes_and_so_the_auditor_can_compute_it():
    value = torch.tensor([[1.0, 2.0]])
    assert tensors_hash({"a": value}) == sha256(b"a\0torch.float32\0(1, 2)\0" + value.numpy().tobytes()).hexdigest()
    others = [{"b": value}, {"a": value.double()}, {"a": value.T}, {"a": value + 1e-6}, {"a": value, "b": value}]
    assert len({tensors_hash(tensors) for tensors in [{"a": value}, *others]}) == 6
    assert tensors_hash({"a": torch.ones(4, 2).T}) == tensors_hash({"a": torch.ones(2, 4)})  # whatever the layout


def test_the_same_weights_in_another_file_agree(certified):
    folder, _, _ = certified
    save(folder, dict(reversed(STATE.items())))
    assert verify_certificate(folder) == []


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda folder: save(folder, STATE | {"dw.w": torch.tensor([1.0, 2.0000002])}), "the released weights are"),
        (lambda folder: save(folder, STATE | {"model.w": torch.zeros(2)}), "the base weights are"),
        (lambda folder: (folder / "new.ckpt").unlink(), "new.ckpt is missing"),
        (lambda folder: (folder / "config.yaml").write_text("seed: 1"), "config.yaml is"),
        (lambda folder: (folder / "report.json").unlink(), "report.json is missing"),
        (lambda folder: forget_more(folder), "the retained samples are"),
    ],
    ids=["weights", "base", "gone", "config", "report", "samples"],
)
def test_what_was_changed_is_named(tamper, message, certified):
    folder, _, _ = certified
    tamper(folder)
    found = verify_certificate(folder)
    assert len(found) == 1
    assert found[0].startswith(message)


def forget_more(folder):
    Manifest.read(folder / "manifest.parquet").forget(np.array([12])).write(folder / "manifest.parquet")


def test_only_the_holder_of_the_receipt_can_tell_whose_samples_they_were(certified):
    folder, contents, receipt = certified
    assert is_about(folder, contents[::-1], receipt)
    assert not is_about(folder, contents[:1], receipt)
    assert not is_about(folder, contents, "0" * 32)
    written = (folder / "certificate.json").read_text()
    assert receipt not in written
    assert not any(content in written for content in contents)
    assert cohort_hash(contents, receipt) == sha256("\n".join([receipt, *sorted(contents)]).encode()).hexdigest()


def test_receipts_differ_from_request_to_request(certified):
    folder, contents, receipt = certified
    first = json.loads((folder / "certificate.json").read_text())["cohort"]["sha256"]
    assert write_certificate(folder, folder / "new.ckpt", "dw.", contents, {}) != receipt
    assert read_certificate(folder)["cohort"]["sha256"] != first


def test_a_folder_without_certificate_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no certificate at"):
        verify_certificate(tmp_path)


def test_files_that_cannot_be_read_are_told_in_words(certified):
    folder, _, _ = certified
    (folder / "new.ckpt").write_bytes(b"x")
    assert any("new.ckpt cannot be read" in entry for entry in verify_certificate(folder))
    (folder / "manifest.parquet").unlink()
    assert verify_certificate(folder) == ["manifest.parquet is missing"]
