import pytest
import torch

from lqf_lightning.backbones.covariance_root import covariance_root
from lqf_lightning.backbones.second_order_pooling import SecondOrderPooling


def test_inner_products_of_features_are_those_of_the_whole_roots() -> None:
    pooling = SecondOrderPooling(7, 4).double()
    maps = torch.randn(3, 7, 3, 3, dtype=torch.float64)
    features = pooling(maps)
    roots = covariance_root(pooling.projection.mT @ maps.flatten(2)).flatten(1)
    assert features.shape == (3, 10)
    torch.testing.assert_close(features @ features.mT, roots @ roots.mT)


def test_directions_are_orthogonal_and_the_squared_norm_does_not_depend_on_their_number() -> None:
    maps = torch.randn(4, 64, 20, 20)
    total = maps.flatten(2).var(-1, correction=0).sum(1)
    for width in (4, 16, 64):
        pooling = SecondOrderPooling(64, width, iterations=12)
        gram = pooling.projection.mT @ pooling.projection
        torch.testing.assert_close(gram, 64 / width * torch.eye(width), rtol=1e-4, atol=1e-4)
        ratio = pooling(maps).square().sum(1) / total
        # The variance along a random direction scatters by sqrt(2 / 400), its mean over the directions by less.
        assert (ratio - 1).abs().max() < (1e-3 if width == 64 else 5 * (2 / (400 * width)) ** 0.5)


def test_the_projection_never_changes_since_heads_were_trained_behind_it() -> None:
    expected = torch.tensor([[1.192815, -0.217445], [-0.275079, -1.031418], [0.039047, -0.623614]])
    torch.testing.assert_close(SecondOrderPooling(3, 2).projection, expected, rtol=0, atol=1e-6)


def test_nothing_of_it_is_trained_or_stored() -> None:
    pooling = SecondOrderPooling(8, 3)
    assert not list(pooling.parameters())
    assert not pooling.state_dict()


def test_maps_of_equal_average_are_told_apart_and_the_order_of_places_is_not_seen() -> None:
    pooling = SecondOrderPooling(6, 4)
    maps = torch.randn(1, 6, 4, 4)
    other = 2 * maps - maps.mean((2, 3), keepdim=True)
    torch.testing.assert_close(pooling(other), 2 * pooling(maps), rtol=1e-4, atol=1e-5)
    shuffled = maps.flatten(2)[:, :, torch.randperm(16)].view_as(maps)
    torch.testing.assert_close(pooling(shuffled), pooling(maps), rtol=1e-4, atol=1e-5)


def test_the_average_follows_where_asked_for() -> None:
    maps = torch.randn(2, 6, 3, 3)
    both = SecondOrderPooling(6, 3, with_average=True, keep_places=True)
    assert both.features == 6 + 6
    expected = torch.cat([SecondOrderPooling(6, 3)(maps), maps.mean((2, 3))], 1)
    assert torch.equal(both(maps), expected[:, :, None, None])


def test_half_precision_rounds_the_map_and_the_features_but_not_the_root() -> None:
    pooling = SecondOrderPooling(32, 8)
    maps = torch.randn(2, 32, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        features = pooling(maps)
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, pooling(maps.float()).bfloat16())


@pytest.mark.parametrize("width", [1, 9])
def test_a_width_that_no_projection_has_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"pooling_width={width}, expected 2 to 8.*Set backbone\.pooling_width=8"):
        SecondOrderPooling(8, width)
