import pytest
import torch

from lqf_lightning.linear.full_precision import full_precision


def settings():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def choose(convolutions, products):
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@full_precision()
def fail_with_settings():
    raise KeyError(*settings())


@pytest.mark.parametrize("before", [(True, False), (True, True), (False, False)])
def test_switches_tf32_off_and_back_also_after_an_error(before):
    original = settings()
    choose(*before)
    try:
        with pytest.raises(KeyError) as raised:
            fail_with_settings()
        assert raised.value.args == (False, False)
        assert settings() == before
    finally:
        choose(*original)
