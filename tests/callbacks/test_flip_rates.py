import json
import math

import pytest
import torch
from lqf_lightning.callbacks.flip_rates import named_rates, summarize

from lqf_lightning.congruence.flip_counts import FlipTally
from lqf_lightning.congruence.intervals import flip_intervals

TABLE = torch.tensor([[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[0, 5], [0, 5]]])  # class, old right?, new right?
TALLY = FlipTally(TABLE, None, torch.tensor(3))


def test_metrics_are_named_by_stage_and_old_model():
    rates = named_rates(TALLY, "val", "")
    assert rates == pytest.approx(
        {
            "val/nfr": 3 / 20, "val/pfr": 7 / 20, "val/nfi": 3 / 4, "val/pfi": 7 / 16, "val/error": 4 / 20,
            "val/error_old": 8 / 20, "val/relative_nfr": (3 / 20) / (12 / 20 * 4 / 20), "val/flips_unshared": 3,
        }
    )  # fmt: skip
    assert named_rates(TALLY, "test", "blue") == {f"test/{key[4:]}/blue": value for key, value in rates.items()}
    assert "val/flips_unshared" not in named_rates(TALLY._replace(unshared=torch.tensor(0)), "val", "")


def test_no_samples_are_no_rates():
    rates = named_rates(FlipTally(torch.zeros_like(TABLE), None, torch.tensor(0)), "val", "")
    assert all(math.isnan(value) for value in rates.values())


def test_the_summary_is_plain_and_has_intervals():
    summary = summarize(TALLY, ["ant", "bee", "cat"], "old")
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["reference"], summary["number"], summary["left_out"]) == ("old", 20, 3)
    interval = flip_intervals(TABLE.sum(0))["nfr"]
    assert summary["rates"]["nfr"] == {"estimate": 0.15, "low": float(interval.low), "high": float(interval.high)}
    assert summary["rates"]["nfr"]["low"] < 0.15 < summary["rates"]["nfr"]["high"]
    ant, bee, cat = (summary["classes"][name] for name in ("ant", "bee", "cat"))
    assert (ant["number"], ant["nfr"], ant["pfr"], ant["error_old"], ant["error_new"]) == (10, 0.3, 0.2, 0.3, 0.4)
    assert 0 <= ant["nfr_low"] < 0.3 < ant["nfr_high"] <= 1
    assert bee["number"] == 0
    assert {value for key, value in bee.items() if key != "number"} == {None}
    assert (cat["nfr"], cat["pfr"], cat["nfi"]) == (0, 0.5, None)
