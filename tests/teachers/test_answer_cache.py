import io
import logging

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from lqf_lightning.teachers import FrozenTeacher, StoredPredictions, View
from lqf_lightning.teachers import answer_cache as module
from lqf_lightning.teachers.answer_cache import AnswerCache, stored_outputs

VIEW = View(4, 1.0, (0.5,) * 3, (0.5,) * 3)
CLASSES, INDEX, SHA = ["ant", "bee", "cat"], [3, 5, 8, 9], ["a", "b", "c", "d"]
OUTPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def teacher(seed=0, classes=CLASSES, view=VIEW, activation=nn.ReLU):
    torch.manual_seed(seed)
    return FrozenTeacher(
        nn.Sequential(nn.Flatten(), nn.Linear(48, 4), activation(), nn.Linear(4, 3)), classes, view, "x"
    )


@pytest.fixture
def cache(tmp_path):
    return AnswerCache(tmp_path / "deep" / "cache")


def test_outputs_are_found_again_bit_for_bit(cache):
    assert cache.find(teacher(), INDEX, SHA) is None
    cache.keep(teacher(), INDEX, SHA, OUTPUTS, "val")
    assert torch.equal(cache.find(teacher(), INDEX, SHA), OUTPUTS)
    assert [path.name for path in cache.folder.iterdir()] == [cache.file(teacher(), INDEX, SHA).name]


def test_files_are_predictions_that_tell_what_they_are_of(cache):
    cache.keep(teacher(), INDEX, SHA, OUTPUTS, "val")
    stored = StoredPredictions.read(cache.file(teacher(), INDEX, SHA))
    assert stored.classes == CLASSES
    assert stored.table["index"].tolist() == INDEX
    assert stored.table["sha"].tolist() == SHA
    assert set(stored.table["split"]) == {"val"}
    assert stored.table["prediction"].tolist() == [CLASSES[i] for i in OUTPUTS.argmax(1)]
    assert stored.table["confidence"].tolist() == pytest.approx(OUTPUTS.softmax(1).amax(1).tolist())


@pytest.mark.parametrize(
    "other",
    [
        (teacher(seed=1), INDEX, SHA),
        (teacher(classes=["ant", "cat", "bee"]), INDEX, SHA),
        (teacher(view=View(4, 0.9, VIEW.mean, VIEW.std)), INDEX, SHA),
        (teacher(activation=nn.Tanh), INDEX, SHA),
        (teacher(activation=lambda: nn.LeakyReLU(0.1)), INDEX, SHA),
        (teacher(), INDEX, ["a", "b", "c", "e"]),
        (teacher(), INDEX, ["b", "a", "c", "d"]),
        (teacher(), [3, 5, 8, 10], SHA),
        (teacher(), INDEX[:3], SHA[:3]),
        (teacher(), INDEX, SHA, "cuda"),
    ],
    ids=["weights", "classes", "view", "activation", "slope", "content", "order", "index", "fewer", "device"],
)
def test_whatever_decides_the_answers_has_a_file_of_its_own(other, cache):
    cache.keep(teacher(), INDEX, SHA, OUTPUTS, "val")
    assert cache.find(*other) is None


def test_another_version_of_a_library_computes_afresh(cache, monkeypatch):
    cache.keep(teacher(), INDEX, SHA, OUTPUTS, "val")
    monkeypatch.setattr(module, "version", lambda name: "9.9" if name == "torch" else "1")
    assert cache.find(teacher(), INDEX, SHA) is None


def damage(path, how):
    raw = path.read_bytes()
    if how == "other predictions":
        stored = StoredPredictions.read(path)
        stored.table["prediction"] = "ant"
        return stored.write(path)
    if how == "other images":
        return stored_outputs(CLASSES, "x", [1, 2, 3, 4], OUTPUTS, logits=True).write(path)
    if how == "no outputs":
        return stored_outputs(CLASSES, "x", INDEX, OUTPUTS, logits=False).write(path)
    changed = {
        "empty": b"",
        "truncated": raw[: len(raw) // 2],
        "headless": b"\0" * 8 + raw[8:],
        "garbage": b"PAR1" * 99,
    }
    return path.write_bytes(changed[how])


@pytest.mark.parametrize(
    "how", ["empty", "truncated", "headless", "garbage", "other predictions", "other images", "no outputs"]
)
def test_a_damaged_file_is_reported_and_written_anew(how, cache, caplog):
    cache.keep(teacher(), INDEX, SHA, OUTPUTS, "val")
    damage(cache.file(teacher(), INDEX, SHA), how)
    with caplog.at_level(logging.WARNING):
        assert cache.find(teacher(), INDEX, SHA) is None
    assert "is damaged" in caplog.text
    cache.keep(teacher(), INDEX, SHA, OUTPUTS, "val")
    assert torch.equal(cache.find(teacher(), INDEX, SHA), OUTPUTS)


def test_no_damage_raises_or_gives_other_outputs(cache, caplog):
    cache.keep(teacher(), INDEX, SHA, OUTPUTS, "val")
    path = cache.file(teacher(), INDEX, SHA)
    raw = path.read_bytes()
    for place in range(0, len(raw), 53):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        found = cache.find(teacher(), INDEX, SHA)
        assert found is None or torch.allclose(found, OUTPUTS, atol=1e-3)


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        AnswerCache(tmp_path / "file").keep(teacher(), INDEX, SHA, OUTPUTS, "val")
    assert "cannot be kept" in caplog.text


def test_two_writers_at_once_leave_one_whole_file(cache, monkeypatch, caplog):
    """The second begins and ends while the first is half-way."""
    write, model, seen = pq.write_table, teacher(), []

    def write_slowly(table, path):
        whole = io.BytesIO()
        write(table, whole)
        half = len(whole.getvalue()) // 2
        with open(path, "wb") as file:
            file.write(whole.getvalue()[:half])
            file.flush()
            if not seen:
                seen.append(cache.find(model, INDEX, SHA))
                cache.keep(model, INDEX, SHA, OUTPUTS, "val")
                seen.append(cache.find(model, INDEX, SHA))
            file.write(whole.getvalue()[half:])

    monkeypatch.setattr(pq, "write_table", write_slowly)
    cache.keep(model, INDEX, SHA, OUTPUTS, "val")
    assert seen[0] is None
    assert torch.equal(seen[1], OUTPUTS)
    assert torch.equal(cache.find(model, INDEX, SHA), OUTPUTS)
    assert len(list(cache.folder.iterdir())) == 1
    assert not caplog.records


def test_predictions_are_the_largest_outputs_even_where_probabilities_are_equal():
    outputs = torch.tensor([[0.01, 0.010000001, -9.0]])
    assert outputs[0, 0] < outputs[0, 1]
    assert torch.equal(*outputs.softmax(1)[0, :2])
    position, confidence = stored_outputs(CLASSES, "x", [0], outputs, logits=False).predictions(torch.tensor([0]))
    assert position.tolist() == [1]
    assert confidence.item() == pytest.approx(0.5, abs=1e-4)
