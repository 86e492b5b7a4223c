import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lqf_lightning.teachers import StoredPredictions

LOGITS = [[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]
TIED = [[0.0, 2.0, 2.0], [3.0, 3.0, 0.0], [0.0, 0.0, 4.0]]


def table(**columns):
    frame = pd.DataFrame({"index": [7, 2, 5], "prediction": ["b", "a", "c"], "logits": LOGITS, "sha": ["x", "y", "z"]})
    return frame.assign(**columns)


def stored(**columns):
    return StoredPredictions(table(**columns), ["a", "b", "c"], "old")


def test_answers_are_found_by_index_in_any_order():
    index = torch.tensor([5, 7, 5, 2])
    assert stored().look_up(index).tolist() == [LOGITS[2], LOGITS[0], LOGITS[2], LOGITS[1]]
    position, confidence = stored().predictions(index)
    assert position.tolist() == [2, 1, 2, 0]
    torch.testing.assert_close(confidence, torch.tensor([LOGITS[k] for k in (2, 0, 2, 1)]).softmax(1).amax(1))


def test_predictions_alone_will_do_and_their_confidence_may_be_unknown():
    frame = table().drop(columns=["logits", "sha"])
    without = StoredPredictions(frame, ["a", "b", "c"], "old")
    assert not without.has_logits
    assert without.predictions(torch.tensor([2]))[1].isnan().all()
    known = StoredPredictions(frame.assign(confidence=[0.5, 0.75, 0.25]), ["a", "b", "c"], "old")
    assert known.predictions(torch.tensor([7, 5]))[1].tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match="no column `logits`"):
        without.look_up(torch.tensor([2]))


def test_a_file_comes_back_as_it_was(tmp_path):
    stored().write(tmp_path / "deep" / "old.parquet")
    again = StoredPredictions.read(tmp_path / "deep" / "old.parquet")
    assert again.classes == ["a", "b", "c"]
    assert again.fingerprint == stored().fingerprint
    assert torch.equal(again.look_up(torch.tensor([2, 5, 7])), stored().look_up(torch.tensor([2, 5, 7])))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["old.parquet"]


def write_plain(path, **columns):
    pq.write_table(pa.Table.from_pandas(pd.DataFrame({"index": [0, 1, 2], **columns})), path)
    return path


def test_a_file_without_class_names_knows_those_of_the_data_and_those_that_it_predicts(tmp_path):
    file = write_plain(tmp_path / "mine.parquet", prediction=["zebra", "ant", "zebra"])
    assert StoredPredictions.read(file).classes == ["ant", "zebra"]
    assert StoredPredictions.read(file, ["cat", "ant"]).classes == ["cat", "ant", "zebra"]


def test_logits_without_class_names_are_refused(tmp_path):
    file = write_plain(tmp_path / "mine.parquet", prediction=["b", "a", "b"], logits=[[0.0, 1.0]] * 3)
    with pytest.raises(ValueError, match="has logits, but its metadata has no `classes`"):
        StoredPredictions.read(file, ["a", "b"])


def test_ties_and_whole_floats_and_numbers_as_classes_will_do():
    assert stored(logits=TIED).look_up(torch.tensor([2])).tolist() == [TIED[1]]
    assert stored(index=[7.0, 2.0, 5.0]).predictions(torch.tensor([5]))[0].tolist() == [2]
    numbers = StoredPredictions(pd.DataFrame({"index": [4], "prediction": [3]}), ["1", "3"], "digits")
    assert numbers.predictions(torch.tensor([4]))[0].tolist() == [1]


def test_the_fingerprint_is_that_of_all_answers():
    assert len({stored().fingerprint, stored(logits=TIED).fingerprint, stored(index=[7, 2, 6]).fingerprint}) == 3


def test_samples_that_are_not_in_the_file_are_named():
    with pytest.raises(ValueError, match=r"no prediction for 2 of 3 val samples, the first is index 3"):
        stored().check([2, 3, 9], ["y", "", ""], "val")
    with pytest.raises(ValueError, match="no prediction for 1 of 1"):
        stored().look_up(torch.tensor([8]))


def test_images_that_have_changed_are_refused():
    stored().check([2, 7], ["y", "x"], "val")
    with pytest.raises(ValueError, match=r"1 of 2 val samples have changed, the first is index 7"):
        stored().check([2, 7], ["y", "other"], "val")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": [2, 2, 5]}, "several predictions for index 2"),
        ({"prediction": ["b", "a", "d"]}, r"predicts \['d'\]"),
        ({"index": [2.5, 3, 5]}, "`index` of type float64"),
        ({"index": [2.0, None, 5]}, "rows without `index`"),
        ({"index": ["2", "3", "5"]}, "`index` of type"),
        ({"prediction": ["a", None, "c"]}, "rows without `prediction`"),
        ({"confidence": ["high", "low", "low"]}, "`confidence` of type"),
        ({"logits": [LOGITS[1], *LOGITS[1:]]}, "predicts b for index 7, but its logits are largest for a"),
        ({"logits": [[0.0], [1.0], [2.0]]}, r"lengths \[1\], expected one number for each of 3"),
    ],
)
def test_tables_that_make_no_sense_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        stored(**columns)


def test_missing_columns_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"add \['prediction'\]"):
        StoredPredictions(table().drop(columns="prediction"), ["a", "b", "c"], "old")
    with pytest.raises(FileNotFoundError, match=r"Set reference=|Set reference to"):
        StoredPredictions.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("index,prediction")
    with pytest.raises(ValueError, match="no Parquet file"):
        StoredPredictions.read(tmp_path / "text.parquet")


def test_class_names_survive_as_json(tmp_path):
    odd = StoredPredictions(pd.DataFrame({"index": [0], "prediction": ['ä, "b"']}), ['ä, "b"', "c"], "old")
    odd.write(tmp_path / "odd.parquet")
    assert json.loads(pq.read_schema(tmp_path / "odd.parquet").metadata[b"classes"]) == odd.classes
    assert StoredPredictions.read(tmp_path / "odd.parquet").classes == odd.classes
