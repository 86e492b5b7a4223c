import pandas as pd
import torch
from lqf_lightning.callbacks.flip_record import tabulate_flips

from lqf_lightning.data import Manifest
from lqf_lightning.teachers import StoredPredictions

NEW, OLD = ["ant", "bee", "cat"], ["dog", "cat", "ant"]
ROWS = [("train", "t.png", 0), *(("val", f"{number}.png", label) for number, label in enumerate([0, 0, 2, 2, 1, 2]))]


def test_flips_are_told_by_name_and_sorted_by_confidence():
    manifest = Manifest.build(ROWS, NEW)
    said = {1: "ant", 2: "ant", 3: "cat", 4: "cat", 5: "dog", 6: "ant"}
    table = pd.DataFrame({
        "index": list(said),
        "prediction": list(said.values()),
        "confidence": [0.25, 0.5, 1, 1, 1, 1],
    })
    old = StoredPredictions(table, OLD, "old")
    index = torch.tensor([6, 1, 2, 3, 4, 5])  # in any order
    prediction = torch.tensor([1, 2, 0, 1, 0, 0])
    confidence = torch.tensor([0.9, 0.5, 0.9, 0.75, 0.625, 0.9])
    flips = tabulate_flips(manifest, old, index, prediction, confidence)
    assert flips.to_dict("list") == {
        "index": [3, 4, 1], "path": ["2.png", "3.png", "0.png"], "class": ["cat", "cat", "ant"],
        "old_prediction": ["cat", "cat", "ant"], "old_confidence": [1, 1, 0.25],
        "new_prediction": ["bee", "ant", "cat"], "new_confidence": [0.75, 0.625, 0.5],
    }  # fmt: skip
