import copy

import pytest
import torch
from torch import nn

from lqf_lightning.methods.encoder import Encoder, feature_width, two_layers
from methods.tensors import build_backbone, draw


def test_an_encoder_projects_what_enters_the_head():
    backbone, images = build_backbone(), draw(5)[0]
    encoder = Encoder(backbone, nn.Linear(3, 2).double())
    encoding = encoder(images)
    features = nn.Sequential(*list(backbone.model)[:-1])(images)
    assert torch.equal(encoding.features, features)
    assert torch.equal(encoding.projection, features @ encoder.projector.weight.T + encoder.projector.bias)
    assert {name.split(".")[0] for name in encoder.state_dict()} == {"model", "projector"}


def test_a_copy_of_an_encoder_runs_its_own_network():
    backbone, images = build_backbone(), draw(5)[0]
    encoder = Encoder(backbone, nn.Identity())
    other = copy.deepcopy(encoder)
    before = other(images).features
    with torch.no_grad():
        encoder.model.conv1.weight.zero_()
    assert other.backbone.model is other.model is not encoder.model
    assert torch.equal(other(images).features, before)
    assert not torch.allclose(encoder(images).features, before)


@pytest.mark.parametrize(("layer", "width"), [(nn.Linear(7, 3), 7), (nn.Conv2d(5, 3, 1), 5)])
def test_the_width_is_that_of_the_input_of_the_head(layer, width):
    backbone = build_backbone()
    backbone.model.fc = layer
    assert feature_width(backbone) == width


def test_a_perceptron_has_one_hidden_layer():
    torch.manual_seed(0)
    plain, normalized = two_layers(3, 5, 2, batch_norm=False), two_layers(3, 5, 2, batch_norm=True)
    inputs = torch.randn(4, 3)
    first, _, last = plain
    assert torch.equal(plain(inputs), last(first(inputs).clamp(min=0)))
    hidden = inputs @ normalized[0].weight.T
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(normalized(inputs), hidden.clamp(min=0) @ normalized[3].weight.T, atol=1e-5)
    assert [tuple(p.shape) for p in normalized.parameters()] == [(5, 3), (5,), (5,), (2, 5)]


@pytest.mark.parametrize(("hidden", "outputs"), [(0, 4), (4, 0)])
def test_layers_without_outputs_are_refused(hidden, outputs):
    with pytest.raises(ValueError, match=r"method\.hidden_width=2048 or method\.projection_width=128"):
        two_layers(8, hidden, outputs, batch_norm=False)
