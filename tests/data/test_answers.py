import logging

import pandas as pd
import pytest
import torch
from PIL import Image

from lqf_lightning.data.answers import answers
from lqf_lightning.teachers import EnsembleTeacher, StoredPredictions, View
from lqf_lightning.teachers.answer_cache import stored_outputs
from old_models import CLASSES, noise_data, old_model, outputs_of, write_noise
from ranks import run_on_ranks

OTHER_VIEW = View(5, 0.8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


@pytest.fixture
def root(tmp_path):
    return write_noise(tmp_path / "images")


def evaluated(root, model, split="val"):
    """Outputs of a model on the data of its own run."""
    data = noise_data(root, view=model.view)
    outputs, index = outputs_of(model.model, data.val_dataloader() if split == "val" else data.test_dataloader())
    return outputs[index.argsort()]


def told(stored, index):
    position, confidence = stored.predictions(torch.tensor(index))
    return [stored.classes[row] for row in position.tolist()], confidence


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("view", [old_model().view, OTHER_VIEW])
def test_predictions_are_those_of_the_models_own_evaluation(view, split, root):
    """Whatever the data module prepares its images for."""
    data, model = noise_data(root), old_model(view=view)
    index = data.manifest.rows(split)["index"].tolist()
    expected = evaluated(root, model, split)
    assert len(expected) == len(index)
    names, confidence = told(answers(data, model, split), index)
    assert names == [CLASSES[row] for row in expected.argmax(1)]
    torch.testing.assert_close(confidence, expected.softmax(1).amax(1))


def test_the_view_matters(root):
    """Else the test above would not see a wrong one."""
    first, second = (evaluated(root, old_model(view=view)).shape for view in (old_model().view, OTHER_VIEW))
    assert first == second
    model = old_model(view=View(6, 1.0, OTHER_VIEW.mean, OTHER_VIEW.std))
    assert not torch.equal(evaluated(root, old_model()).argmax(1), evaluated(root, model).argmax(1))


def test_members_see_their_own_images_and_are_averaged_by_name(root):
    data = noise_data(root)
    members = [old_model(1), old_model(2, ["cat", "ant", "bee"], OTHER_VIEW)]
    first, second = (evaluated(root, member) for member in members)
    mean = (first + second[:, [1, 2, 0]]) / 2
    both = EnsembleTeacher(members)
    names, confidence = told(answers(data, both, "val"), data.manifest.rows("val")["index"].tolist())
    assert names == [CLASSES[row] for row in mean.argmax(1)]
    torch.testing.assert_close(confidence, mean.softmax(1).amax(1))
    assert names != [CLASSES[row] for row in first.argmax(1)]


def count_calls(model):
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_second_run_asks_the_disk(root, tmp_path):
    model, cache = old_model(), tmp_path / "cache"
    calls = count_calls(model)
    first = answers(noise_data(root), model, "val", cache_dir=cache)
    assert len(calls) == 4  # 24 samples by 6
    again = answers(noise_data(root), model, "val", cache_dir=cache)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(again.table, first.table)
    answers(noise_data(root), model, "test", cache_dir=cache)
    assert len(calls) == 4 + 4  # 21 samples


def test_nothing_is_kept_unless_asked_for(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = old_model()
    calls = count_calls(model)
    for _ in range(2):
        answers(noise_data(root), model, "val")
    assert len(calls) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_changed_image_is_predicted_anew(root, tmp_path):
    model, cache = old_model(), tmp_path / "cache"
    before = answers(noise_data(root), model, "val", cache_dir=cache)
    calls = count_calls(model)
    Image.new("RGB", (8, 8), "white").save(root / "val" / "ant" / "0.png")
    after = answers(noise_data(root), model, "val", cache_dir=cache)
    assert len(calls) == 4
    changed = before.table["confidence"] != after.table["confidence"]
    assert changed.sum() == 1
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_file_is_replaced(root, tmp_path, caplog):
    model, cache = old_model(), tmp_path / "cache"
    first = answers(noise_data(root), model, "val", cache_dir=cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        second = answers(noise_data(root), model, "val", cache_dir=cache)
    assert "is damaged" in caplog.text
    pd.testing.assert_frame_equal(second.table, first.table)
    StoredPredictions.read(file)


def test_members_of_an_ensemble_are_kept_apart(root, tmp_path):
    first, second, cache = old_model(1), old_model(2), tmp_path / "cache"
    answers(noise_data(root), first, "val", cache_dir=cache)
    calls = [count_calls(first), count_calls(second)]
    both = answers(noise_data(root), EnsembleTeacher([first, second]), "val", cache_dir=cache)
    assert [len(each) for each in calls] == [0, 4]
    alone = answers(noise_data(root), EnsembleTeacher([first, second]), "val")
    pd.testing.assert_frame_equal(both.table, alone.table)


def test_looking_changes_neither_random_numbers_nor_the_model(root):
    model, data = old_model(), noise_data(root)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    modes = []  # a model that is moved in inference mode cannot be trained on afterwards
    model.model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    with torch.inference_mode():
        answers(data, model, "val")
    assert set(modes) == {False}
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_stored_predictions_are_taken_as_they_are(root):
    data = noise_data(root)
    index = data.manifest.rows("val")["index"].tolist()
    table = pd.DataFrame({"index": index, "prediction": [CLASSES[i % 3] for i in index]})
    stored = StoredPredictions(table, CLASSES, "file")
    assert answers(data, stored, "val") is stored


@pytest.mark.parametrize(("fault", "message"), [("missing", "no prediction for 1 of 24"), ("changed", "1 of 24 val")])
def test_stored_predictions_of_other_samples_are_refused(fault, message, root):
    data = noise_data(root)
    with pytest.raises(ValueError, match=message):
        answers(data, unfit(data, fault), "val")


def unfit(data, fault):
    data.manifest.hash_contents()
    table = data.manifest.rows("val")[["index", "class", "sha"]].rename(columns={"class": "prediction"})
    if fault == "missing":
        table = table.iloc[:-1]
    else:
        table.iloc[3, 2] = "0" * 40
    return StoredPredictions(table, CLASSES, "file")


@pytest.fixture
def few(tmp_path):
    """One validation sample of each class: with four ranks, one has none."""
    return write_noise(tmp_path / "few", {"train": 2, "val": 1}, uneven=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("own_disks", [False, True])
def test_ranks_share_the_work_and_agree(world_size, own_disks, root, few, tmp_path):
    members = [old_model(1), old_model(2, view=OTHER_VIEW)]

    def work():
        rank = torch.distributed.get_rank()
        cache = tmp_path / f"cache{rank if own_disks else ''}"
        calls, rounds = count_calls(members[0]), []
        for _ in range(2):
            both = [answers(noise_data(r), EnsembleTeacher(members), "val", cache_dir=cache) for r in (root, few)]
            rounds.append((len(calls), [stored.table.to_dict("list") for stored in both]))
        return rounds

    alone = [answers(noise_data(r), EnsembleTeacher(members), "val").table for r in (root, few)]
    for rank, rounds in enumerate(run_on_ranks(world_size, work)):
        assert rounds[1][0] == rounds[0][0], "the second time everything is known"
        assert rank or rounds[0][0] == {1: 5, 2: 5, 3: 5, 4: 4}[world_size]
        for _, tables in rounds:
            for got, expected in zip(tables, alone, strict=True):
                assert got["index"] == expected["index"].tolist()
                assert got["prediction"] == expected["prediction"].tolist()
                assert got["confidence"] == pytest.approx(expected["confidence"].tolist(), abs=1e-6)
    written = {path.name for path in tmp_path.glob("cache*")}
    assert written == {"cache0" if own_disks else "cache"}


@pytest.mark.parametrize("fault", ["missing", "changed"])
def test_all_ranks_refuse_with_the_same_words(fault, root):
    whole = noise_data(root)
    stored = unfit(whole, fault)

    def work():
        data = noise_data(root)  # only the first rank will hash it
        try:
            answers(data, stored, "val")
        except ValueError as error:
            return str(error), bool((data.manifest.table["sha"] != "").any())
        return "accepted", False

    results = run_on_ranks(2, work)
    assert len({text for text, _ in results}) == 1
    assert "Set " in results[0][0]
    assert [hashed for _, hashed in results] == [True, False]


def test_logits_are_not_carried_around(root):
    assert not answers(noise_data(root), old_model(), "val").has_logits
    assert stored_outputs(CLASSES, "x", [0], torch.zeros(1, 3), logits=True).has_logits
