import logging

import pytest
import torch

from lqf_lightning.data import Manifest
from lqf_lightning.methods.leaking_start import judged_samples, mark_seen, refuse_seen, seen_at_start


class Data:
    """Six training images of three classes, one of them unused, and one for testing."""

    def __init__(self, seen):
        rows = [("train", f"{number}", number % 3) for number in range(6)] + [("test", "6", 0)]
        self.manifest = Manifest.build(rows, ["a", "b", "c"])
        self.manifest.table.loc[5, "used"] = False
        self.seen_by_weights = None if seen is None else torch.tensor([number in seen for number in range(7)])


USED = torch.arange(5)


@pytest.mark.parametrize("data", [None, object(), Data(None), Data([]), Data([5, 6])])
def test_where_no_training_sample_is_known_to_have_been_seen_all_judge(data):
    assert judged_samples(data, USED) is None
    assert seen_at_start(data, USED) is None


def test_samples_that_have_been_seen_do_not_judge():
    data = Data([1, 3, 5])
    assert judged_samples(data, USED).tolist() == [True, False, True, False, True]
    assert judged_samples(data, torch.tensor([4, 3, 0])).tolist() == [True, False, True]
    assert seen_at_start(data).tolist() == [False, True, False, True, False]  # of those that are trained on


def test_copies_of_an_image_judge_as_it_does():
    data = Data([1])
    copies = torch.cat([USED, USED + 7])
    assert judged_samples(data, copies).tolist() == [True, False, True, True, True] * 2
    with pytest.raises(ValueError, match=r"got 1 of 5\."):  # two copies of one image
        judged_samples(Data([0, 1, 2, 3]), copies)


@pytest.mark.parametrize(("seen", "left"), [(range(5), 0), (range(4), 1), ([1, 2, 4], 2)])
def test_too_few_judges_are_refused(seen, left):
    # The last are two images of one class: to name it always would be right in every case.
    text = (
        rf"at least 2, of more than one class, got {left} of 5\. Set head=random.*data\.part=user\. Or choose nothing"
    )
    with pytest.raises(ValueError, match=text):
        judged_samples(Data(seen), USED)


def test_two_judges_of_one_class_do_where_there_is_no_other():
    data = Data([0])
    data.manifest.table["label"] = 0
    assert judged_samples(data, torch.tensor([0, 1, 2])).tolist() == [False, True, True]


def test_what_concerns_seen_samples_is_refused():
    data = Data([1, 3])
    refuse_seen(data, "things", torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match=r"things would be wrong for 1 of 2 samples.*Set head=random"):
        refuse_seen(data, "things", torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"things would be wrong for 2 of 5 samples"):
        refuse_seen(data, "things")


def test_what_concerns_some_seen_samples_is_told(caplog):
    with caplog.at_level(logging.INFO):
        mark_seen(Data(None), "things")
        mark_seen(Data([5, 6]), "things")
        assert caplog.records == []
        mark_seen(Data([1, 3]), "things")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "things are wrong for 2 of 5 samples, marked `seen_by_weights`" in record.getMessage()
    with pytest.raises(ValueError, match="things would be wrong for 5 of 5 samples"):
        mark_seen(Data(range(5)), "things")
    with pytest.raises(ValueError, match="things would be wrong for 1 of 1 samples"):
        mark_seen(Data([1]), "things", torch.tensor([1]))
