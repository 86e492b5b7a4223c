import pytest
import torch

from lqf_lightning.congruence.state_layout import check_layout


def test_equal_layouts_pass_in_any_order():
    check_layout({"a": torch.zeros(2), "b": torch.ones(1).long()}, {"b": torch.ones(1).long(), "a": torch.ones(2)})


def test_all_kinds_of_gaps_are_listed():
    first = {"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}
    second = {"b": torch.zeros(3), "c": torch.zeros(1).long(), "d": torch.zeros(1)}
    with pytest.raises(ValueError, match="the left and the right model differ") as caught:
        check_layout(first, second, ("left", "right"))
    for words in (
        "a is missing in the right",
        "d is missing in the left",
        "b is (1,) torch.float32 in the left and (3,) torch.float32 in the right",
        "c is (1,) torch.float32 in the left and (1,) torch.int64 in the right",
    ):
        assert words in str(caught.value)


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match="x4 is missing in the new; and 15 more"):
        check_layout({f"x{number}": torch.zeros(1) for number in range(20)}, {})
