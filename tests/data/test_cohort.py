import json

import numpy as np
import pandas as pd
import pytest
import torch

from lqf_lightning.data.cohort import Cohort
from lqf_lightning.data.manifest import Manifest

SPLITS = ["train"] * 20 + ["val", "unlabeled"]
PATHS = [f"{'ab'[n % 2]}/{n}" for n in range(22)]
LABELS = [n % 2 for n in range(20)] + [0, -1]


@pytest.fixture
def manifest():
    return Manifest.build(zip(SPLITS, PATHS, LABELS, strict=True), ["ant", "bee"])


def members(spec, manifest, **options):
    return Cohort.parse(spec, manifest, **options).indices.tolist()


@pytest.mark.parametrize("spec", [[17, 3], ["b/17", "b/3"], torch.tensor([17, 3]).tolist(), np.array([3, 17]).tolist()])
def test_a_list_names_samples_by_index_or_path(spec, manifest):
    assert members(spec, manifest) == [3, 17]


@pytest.mark.parametrize("form", ["parquet", "csv", "json", "txt"])
def test_a_file_names_samples_as_a_subset_does(form, tmp_path, manifest):
    table, file = pd.DataFrame({"path": ["b/3", "b/17"]}), tmp_path / f"request.{form}"
    if form == "parquet":
        table.to_parquet(file)
    elif form == "csv":
        table.to_csv(file, index=False)
    else:
        file.write_text(json.dumps([3, 17]) if form == "json" else "3\n17\n")
    cohort = Cohort.parse(str(file), manifest)
    assert cohort.indices.tolist() == [3, 17]
    assert cohort.spec == f"2 samples of a .{form} file"


def test_classes_are_those_that_the_run_was_told(manifest):
    manifest.table.loc[1, ["label", "class"]] = [0, "ant"]  # the label was noisy
    assert members({"class": "ant"}, manifest) == [0, 1, *range(2, 20, 2)]
    assert members({"classes": ["ant", "bee"]}, manifest, whole=True) == list(range(20))


def test_a_fraction_is_drawn_by_lot_and_goes_on_after_a_request(manifest):
    first = members({"fraction": 0.25, "seed": 1}, manifest)
    assert len(first) == 5
    assert first != members({"fraction": 0.25, "seed": 2}, manifest)
    larger = members({"fraction": 0.5, "seed": 1}, manifest)
    assert set(first) < set(larger)
    second = members({"fraction": 1 / 3, "seed": 1}, manifest.forget(np.array(first)))
    assert sorted(first + second) == larger


def test_words_name_no_sample(manifest):
    assert Cohort.parse(["b/17", "b/3"], manifest).spec == "2 samples by name"
    assert Cohort.parse({"fraction": 0.1}, manifest).spec == "fraction 0.1, seed 0"
    assert Cohort.parse({"class": "bee"}, manifest).spec == "class bee"


def test_core_data_is_left_out_of_what_does_not_name_it(manifest):
    core = torch.arange(10)
    assert members({"class": "ant"}, manifest, core=core) == list(range(10, 20, 2))
    assert members("all", manifest, core=core, whole=True) == list(range(10, 20))
    assert min(members({"fraction": 0.5}, manifest, core=core)) >= 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([3, 99], "1 of 2 entries are no training samples; the first is index 99"),
        ([20], "the first is index 20"),  # held out
        (["b/3", "x"], "the first is path x"),
        ([3, 3], "index 3 is named more than once"),
        ([], "is empty: there is nothing to forget"),
        ({"fraction": 0.01}, "fraction 0.01, seed 0 is empty"),
        ({"fraction": 0.0}, "got a fraction of 0.0"),
        ({"fraction": 1.0}, "all 20 training samples: nothing would be left"),
        ("all", "all 20 training samples: nothing would be left"),
        (list(range(20)), "all 20 training samples: nothing would be left"),
        ({"class": "wasp"}, r"no class is called wasp. Expected some of \['ant', 'bee'\]"),
        ({"classes": "wasp"}, "no class is called wasp"),
        ({"fraction": "much"}, "got a fraction of much, expected a number.*Set cohort="),
        ({"fraction": None}, "got a fraction of None"),
        ({"fraction": 0.1, "seed": "x"}, "got the seed x, expected a whole number.*Set cohort="),
        ({"group": 1}, r"keys \['group'\].*Expected a list of indices"),
        (None, "is a NoneType. Expected a list"),
        ("gone.txt", "cohort=gone.txt: there is no such file. Set cohort to another file"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(spec, message, manifest):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Cohort.parse(spec, manifest)


def test_core_data_that_is_named_is_refused(manifest):
    with pytest.raises(ValueError, match=r"1 of 2 samples are core data.*first is index 3"):
        Cohort.parse([3, 17], manifest, core=torch.arange(10))
    with pytest.raises(ValueError, match="all 10 training samples"):
        Cohort.parse("all", manifest, core=torch.arange(10))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("used", False, "index 3, which was not used by the run"),
        ("removed", True, "index 3, which was gone already"),
        ("labeled", False, "index 3, which was used without its label"),
    ],
)
def test_samples_that_the_run_did_not_learn_from_are_refused(column, value, message, manifest):
    manifest.table.loc[3, column] = value
    with pytest.raises(ValueError, match=message):
        Cohort.parse([3, 17], manifest)


@pytest.mark.parametrize("spec", [[3], ["b/3"]])
def test_a_second_request_for_the_same_sample_is_refused(spec, manifest):
    with pytest.raises(ValueError, match="index 3, which was forgotten by an earlier request"):
        Cohort.parse(spec, manifest.forget(np.array([3])))
