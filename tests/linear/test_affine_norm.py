import copy

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from lqf_lightning.linear.affine_norm import AffineNorm, use_affine_norms


def test_values_and_gradients_stay_what_they_are(x: Tensor) -> None:
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3)
    net = nn.Sequential(
        shared, nn.Tanh(), shared, BatchNormAct2d(3), nn.BatchNorm2d(3, affine=False), nn.Flatten(),
        nn.BatchNorm1d(192), nn.Sequential(nn.BatchNorm1d(192, affine=False, track_running_stats=False)),
    ).double().eval()  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | BatchNormAct2d) and module.running_var is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    plain = copy.deepcopy(net)
    before = list(net.parameters())
    use_affine_norms(net)
    assert sum(isinstance(module, AffineNorm) for module in net.modules()) == 4
    assert net[0] is net[2]
    assert isinstance(net[7][0], nn.BatchNorm1d)  # without statistics there is no evaluation form
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))
    assert list(net.state_dict()) == list(plain.state_dict())
    outputs = [n(x) for n in (net, plain)]
    gradients = [
        torch.autograd.grad(o.sin().sum(), list(n.parameters())) for o, n in zip(outputs, (net, plain), strict=True)
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
