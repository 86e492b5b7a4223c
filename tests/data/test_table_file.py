import pandas as pd
import pytest

from lqf_lightning.data import table_file
from lqf_lightning.data.table_file import read_notes, write_table


def test_a_table_and_its_notes_come_back(tmp_path):
    table = pd.DataFrame({"index": [3, 5], "score": [0.5, 1.5]}, index=[7, 8])
    write_table(table, tmp_path / "new" / "scores.parquet", {"settings": {"sigma": 2.0}})
    assert pd.read_parquet(tmp_path / "new" / "scores.parquet").equals(table.reset_index(drop=True))
    assert read_notes(tmp_path / "new" / "scores.parquet", "settings") == {"sigma": 2.0}
    assert read_notes(tmp_path / "new" / "scores.parquet", "others") is None


def test_whoever_is_interrupted_leaves_the_earlier_table(tmp_path, monkeypatch):
    file, before = tmp_path / "scores.parquet", pd.DataFrame({"index": [1]})
    write_table(before, file)

    def stop(_, where):
        where.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(table_file.pq, "write_table", stop)
    with pytest.raises(KeyboardInterrupt):
        write_table(pd.DataFrame({"index": [2]}), file)
    assert pd.read_parquet(file).equals(before)
