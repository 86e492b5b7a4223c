import pytest

from lqf_lightning.data import Stream, TwoViews


def test_ordinary_training_is_the_default():
    stream = Stream()
    assert (stream.samples, stream.views, stream.unlabeled_ratio) == ("labeled", None, 1)


def test_streams_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="one of labeled, all, both, got 'unlabeled'"):
        Stream("unlabeled", TwoViews)
    with pytest.raises(ValueError, match=r"at least 1, got 0\. Set method\.unlabeled_ratio="):
        Stream("both", TwoViews, 0)
