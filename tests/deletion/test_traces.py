import html
import json
import urllib.parse

import pandas as pd
import pytest

from lqf_lightning.deletion.traces import Traces, names_samples

TRACES = Traces([1, 5], ["digits/1", "train/a b/x+y.png"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("digits/1", True),
        ("digits/17", False),
        ("xdigits/1", False),
        ('{"path": "digits/1", ', True),
        ("digits\\/1", True),
        ("see /data/digits/1 here", True),
        ("/data/train/a b/x+y.png", True),
        ("val/a b/x+y.png", False),
        ("digits/1.png", False),
        ("cannot read digits/1.", True),
        ("digits/1...", True),
        ("digits/1..png", False),
    ],
)
def test_paths_are_found_where_no_longer_name_goes_on(text, found):
    assert TRACES.in_bytes(text.encode()) == found


@pytest.mark.parametrize("write", [json.dumps, html.escape, urllib.parse.quote, str])
def test_paths_are_found_as_other_formats_spell_them(write):
    known, other = "train/bl\u00fce & co/1.png", "train/bl\u00fce & co/2.png"
    traces = Traces([1], [known])
    assert traces.in_bytes(f"see {write(known)}!".encode())
    assert not traces.in_bytes(f"see {write(other)}!".encode())


def test_rows_are_found_by_index_or_path():
    table = pd.DataFrame({"index": ["5", "6", "x"], "path": ["a", "digits/1", "b"]})
    assert TRACES.rows(table).tolist() == [True, True, False]
    assert TRACES.rows(table[["path"]]).tolist() == [False, True, False]
    assert not TRACES.rows(pd.DataFrame({"epoch": [1, 5]})).any()


def test_lists_count_under_keys_that_mean_samples():
    assert TRACES.in_lists({"top": {"index": [9, 5]}})
    assert TRACES.in_lists([{"most_influential_index": 1}])
    assert not TRACES.in_lists({"epochs": [1, 5], "index": [2]})


def test_an_empty_request_finds_nothing():
    assert not Traces([], []).in_bytes(b"anything")


def test_names_of_columns_and_tensors():
    assert [names_samples(name) for name in ("index", "a.index", "pair_index", "paths", "indexed", "reindex")] == [
        True, True, True, True, False, False,
    ]  # fmt: skip
