import pytest
from torch import nn

from lqf_lightning.congruence.evaluation_mode import evaluation_mode


def model():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    net[1].eval()
    net[1][1].train()
    return net


def test_every_module_gets_its_own_mode_back():
    net = model()
    before = [module.training for module in net.modules()]
    assert len(set(before)) == 2
    with evaluation_mode(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == before


def test_modes_come_back_after_an_error():
    net = model()
    before = [module.training for module in net.modules()]
    with pytest.raises(KeyError), evaluation_mode(net):
        raise KeyError
    assert [module.training for module in net.modules()] == before


def test_modules_with_a_will_of_their_own_get_their_mode_back():
    class Stubborn(nn.Dropout):
        def train(self, mode=True):
            return super().train(False)

    net = nn.Sequential(Stubborn())
    net[0].training = True
    with evaluation_mode(net):
        assert not net[0].training
    assert net[0].training
