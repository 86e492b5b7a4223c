import copy

import timm
import torch
from torch import nn

from lqf_lightning.backbones.activations import swap_activations
from lqf_lightning.backbones.blended_activation import BlendedActivation, blend_activations


def test_mixtures_lead_from_the_original_to_the_leaky_network_and_keep_all_names():
    original = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()  # ReLU6, in place
    swapped = copy.deepcopy(original)
    number = swap_activations(swapped, 0.1)
    mixed = copy.deepcopy(swapped)
    mixtures = blend_activations(original, mixed)
    assert len(mixtures) == number
    assert mixed.state_dict().keys() == original.state_dict().keys()
    images = 3 * torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(mixed(images), swapped(images))
        for mixture in mixtures:
            mixture.share = 0.0
        # torch.lerp by 0 is exact
        assert torch.equal(mixed(images), original(images))


def test_halfway_the_ceiling_is_halfway_gone():
    mixture, x = BlendedActivation(nn.ReLU6(), nn.LeakyReLU(0.1)), torch.tensor([-10.0, 3.0, 16.0])
    mixture.share = 0.5
    assert torch.allclose(mixture(x), torch.tensor([-0.5, 3.0, 11.0]))
    assert x.tolist() == [-10.0, 3.0, 16.0]


def test_activations_that_were_leaky_before_stay():
    original = nn.Sequential(nn.LeakyReLU(0.2), nn.ReLU())
    swapped = nn.Sequential(nn.LeakyReLU(0.2), nn.LeakyReLU(0.1))
    assert len(blend_activations(original, swapped)) == 1
    assert isinstance(swapped[0], nn.LeakyReLU)


def test_an_activation_that_stands_in_two_places_is_mixed_in_both():
    shared = nn.ReLU()
    original = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    swapped = copy.deepcopy(original)
    swap_activations(swapped, 0.1)
    mixtures = blend_activations(original, swapped)
    assert [swapped[1], swapped[3]] == mixtures
    for mixture in mixtures:
        mixture.share = 0.0
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(swapped(x), original(x))
