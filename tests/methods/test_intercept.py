import logging

import pytest
import torch
from torch import nn

from lqf_lightning.linear import LinearizedModel
from lqf_lightning.methods.intercept import is_intercept
from methods.dense_lqf import build


def network(*behind: nn.Module) -> LinearizedModel:
    torch.manual_seed(0)
    return LinearizedModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3), *behind).double())


@pytest.mark.parametrize(
    ("behind", "bias", "expected"),
    [
        ([], "3.bias", True),
        ([], "1.bias", False),
        ([], "7.bias", False),
        ([nn.Tanh()], "3.bias", False),
        ([nn.Linear(3, 3)], "3.bias", False),
        ([nn.Identity()], "3.bias", True),
    ],
)
def test_only_a_bias_that_shifts_all_outputs_is_the_intercept(behind, bias, expected):
    assert is_intercept(network(*behind), bias, 2) is expected


@pytest.mark.parametrize(
    ("options", "warned"),
    [({"layers": ["stage1"]}, True), ({"layers": ["stage1"], "intercept": False}, False), ({}, False)],
)
def test_an_intercept_that_is_asked_for_and_not_there_is_warned_of(options, warned, caplog):
    caplog.set_level(logging.WARNING, "lqf_lightning")
    build(**options)
    expected = ["there is no intercept: fc.bias is not linearized, or does not shift all outputs alike"]
    assert caplog.messages == (expected if warned else [])
