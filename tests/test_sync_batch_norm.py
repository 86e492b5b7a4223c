import pytest
import timm
import torch
from lightning import Trainer
from timm.layers import BatchNormAct2d
from torch.nn import BatchNorm2d, SyncBatchNorm

from lqf_lightning.sync_batch_norm import TimmSyncBatchNorm
from tiny import run_tiny


def build(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3)
    network.train()(torch.randn(8, 3, 64, 64))  # statistics of its own
    return network.eval()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "test_resnet"])
@torch.no_grad()
def test_the_network_computes_the_same_with_synchronized_norms_and_after(name):
    network, images = build(name), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before, plugin, kinds = network(images), TimmSyncBatchNorm(), [type(m) for m in network.modules()]
    assert plugin.apply(network) is network
    norms = [m for m in network.modules() if isinstance(m, (BatchNorm2d, BatchNormAct2d, SyncBatchNorm))]
    assert norms
    assert all(isinstance(module, SyncBatchNorm) for module in norms)
    assert torch.equal(network(images), before)
    assert len(network.state_dict()) == len(build(name).state_dict())
    for module in norms:
        module.running_mean = module.running_mean + 0.1  # another tensor, as moving to a device makes
    changed = network(images)
    assert not torch.equal(changed, before)
    assert plugin.revert(network) is network
    assert [type(m) for m in network.modules()] == kinds
    assert torch.equal(network(images), changed)


def test_torch_alone_would_lose_the_activations():
    network, images = build("tf_efficientnet_lite0"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = network(images)
        assert not torch.allclose(SyncBatchNorm.convert_sync_batchnorm(network).eval()(images), before, rtol=0.1)


def test_a_run_takes_the_plugin(tmp_path, folder_of_shapes, monkeypatch):
    used = []
    original = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *a, **k: (used.append(k), original(self, *a, **k))[1])
    options = ("method=finetune", "trainer.max_epochs=1", "callbacks=[]", "test=false")
    run_tiny(tmp_path, folder_of_shapes, *options, "+trainer.sync_batchnorm=true")
    assert isinstance(used[0]["plugins"][0], TimmSyncBatchNorm)
    assert used[0]["sync_batchnorm"] is False
