from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lqf_lightning.callbacks.sample_record import tabulate_scores

from lqf_lightning.analysis import SampleScores
from lqf_lightning.information import label_suspects


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_labels_that_are_equally_surprising_are_ranked_by_margin(scale):
    """Of all right labels the temperature is 0, of all wrong ones infinite: suspicions are 0, or log C."""
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    prediction = scale * torch.tensor([3.0, 9.0, 5.0, 8.0, 4.0, 6.0])[:, None] * torch.eye(3)[label]
    nothing = torch.zeros(6)
    found = label_suspects(prediction, label, torch.eye(3)[label] - prediction)
    scores = SampleScores(torch.arange(6), prediction, prediction, nothing, None, None, None, None, nothing, found, {})
    rows = pd.DataFrame({"index": range(6), "path": "x", "label": 0, "class": "y"})
    table = tabulate_scores(scores, SimpleNamespace(table=rows, classes=["a", "b", "c"]))
    assert table["suspicion"].nunique() == 1
    assert not np.signbit(table["suspicion"]).any()
    assert table["suspicion_rank"].tolist() == ([1, 6, 3, 5, 2, 4] if scale > 0 else [6, 1, 4, 2, 5, 3])
