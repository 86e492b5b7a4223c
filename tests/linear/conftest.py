import pytest
import torch
from torch import Tensor, nn

from linear.nets import BUILD, build_net


@pytest.fixture(params=list(BUILD))
def net(request: pytest.FixtureRequest) -> nn.Module:
    return build_net(request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
