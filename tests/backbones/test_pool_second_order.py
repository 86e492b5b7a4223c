from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from linear.nets import dense_jacobian
from lqf_lightning.backbones import Backbone, create_backbone, penultimate_features
from lqf_lightning.backbones.second_order_pooling import SecondOrderPooling
from lqf_lightning.linear.assemble import assemble_kernel
from lqf_lightning.linear.linearized import LinearizedModel

SIZE = 64  # the last map of test_resnet then has 2 x 2 places


def build(name: str = "test_resnet", classes: int = 3, pooling: str = "second_order", **options: object) -> Backbone:
    options = {"weights": None, "image_size": SIZE, "pooling_width": 6, **options}
    return create_backbone(name, classes, pooling=pooling, **options)


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(
    ("name", "library", "place"),
    [
        ("test_resnet", "timm", "global_pool"),
        ("resnet18", "torchvision", "avgpool"),
        ("test_efficientnet", "timm", "global_pool"),
        ("resnetv2_50", "timm", "head.global_pool"),  # its head is a convolution
    ],
)
@pytest.mark.parametrize("pooling", ["second_order", "both"])
def test_the_head_sees_the_new_features_of_the_last_map(name: str, library: str, place: str, pooling: str) -> None:
    backbone = build(name, library=library, pooling=pooling)
    pool, head = backbone.model.get_submodule(place), backbone.model.get_submodule(backbone.head)
    assert isinstance(pool, SecondOrderPooling)
    maps: list[Tensor] = []
    pool.register_forward_pre_hook(lambda _, given: maps.append(given[0]))
    with torch.no_grad():
        features = penultimate_features(backbone, images())
        channels = maps[0].shape[1]
        assert features.shape == (2, 21 + channels * (pooling == "both"))
        plain = SecondOrderPooling(channels, 6)(maps[0])
        torch.testing.assert_close(features[:, :21], plain)
        if pooling == "both":
            torch.testing.assert_close(features[:, 21:], maps[0].mean((2, 3)))
        logits = features @ head.get_parameter("weight").flatten(1).T + head.get_parameter("bias")
        torch.testing.assert_close(backbone.model(images()), logits)


@pytest.mark.parametrize(
    ("name", "library"),
    [("vit_tiny_patch16_224", "timm"), ("convnext_atto", "timm"), ("mobilenet_v3_small", "torchvision"),
     ("shufflenet_v2_x0_5", "torchvision"), ("squeezenet1_1", "torchvision")],
)  # fmt: skip
def test_networks_without_an_average_before_their_head_are_refused(name: str, library: str) -> None:
    with pytest.raises(ValueError, match=rf"backbone\.name={name} does not .*Set backbone\.pooling=average"):
        build(name, library=library)


def test_a_map_of_one_place_is_refused_and_the_size_that_has_more_is_told() -> None:
    with pytest.raises(ValueError, match=r"image_size=32 the last map .* has one place.*Set data\.image_size=128"):
        build(image_size=32)


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pooling=max, expected average, second_order, both"):
        build(pooling="max")


def test_the_new_head_has_the_deviation_asked_for_and_all_else_keeps_its_names() -> None:
    torch.manual_seed(0)
    backbone = build(pooling_width=40, head_std=0.3)
    weight = backbone.model.get_submodule(backbone.head).get_parameter("weight")
    assert weight.shape == (3, 820)
    assert abs(weight.std().item() / 0.3 - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert not backbone.model.training
    average = build(pooling="average")
    assert backbone.model.state_dict().keys() == average.model.state_dict().keys()
    assert backbone.groups == average.groups


def test_weights_of_either_pooling_are_read_and_a_head_of_another_width_is_left_out(tmp_path: Path) -> None:
    second, average = build(), build(pooling="average")
    for name, backbone in (("second", second), ("average", average)):
        torch.save(backbone.model.state_dict(), tmp_path / f"{name}.pt")

    def head(backbone: Backbone) -> Tensor:
        return backbone.model.get_submodule(backbone.head).get_parameter("weight")

    same = build(weights=tmp_path / "second.pt")
    torch.testing.assert_close(same.model(images()), second.model(images()), rtol=0, atol=0)
    for loaded, source in (
        (build(weights=tmp_path / "average.pt"), average),
        (build(weights=tmp_path / "second.pt", pooling_width=7), second),
        (build(weights=tmp_path / "second.pt", pooling="average"), second),
    ):
        body = {key: t for key, t in source.model.state_dict().items() if not key.startswith(f"{source.head}.")}
        assert all(torch.equal(loaded.model.state_dict()[key], t) for key, t in body.items())
        assert head(loaded).shape != head(source).shape
        assert 0 < head(loaded).std() < 0.04


def test_leaky_activations_and_folded_norms_go_with_it(tmp_path: Path) -> None:
    backbone = build(leaky_slope=0.1)
    torch.save(backbone.model.state_dict(), tmp_path / "weights.pt")
    folded = build(leaky_slope=0.1, fold_batch_norm=True, weights=tmp_path / "weights.pt")
    assert isinstance(folded.model.get_submodule("global_pool"), SecondOrderPooling)
    assert any(isinstance(module, nn.LeakyReLU) for module in folded.model.modules())
    assert folded.groups["head"] == ("fc.weight", "fc.bias")
    with torch.no_grad():
        torch.testing.assert_close(folded.model(images()), backbone.model(images()), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def smooth() -> nn.Module:
    """A network without kinks, so that differences converge."""
    torch.manual_seed(0)
    model = build(classes=2, pooling="both", head_std=0.5).model.double()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus())
            if isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(2))
    return model


def test_the_linearized_network_has_its_derivative(smooth: nn.Module) -> None:
    x = images(2, torch.float64)
    with torch.no_grad():
        start = {name: parameter.clone() for name, parameter in smooth.named_parameters()}
        direction = {name: torch.randn_like(p) * p.std(correction=0).clamp(min=0.01) for name, p in start.items()}

        def at(step: float) -> Tensor:
            moved = {name: start[name] + step * direction[name] for name in start}
            return torch.func.functional_call(smooth, moved, (x,))

        h = 1e-4
        expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)  # error of order h^4
        value = at(0.0)
    linear = LinearizedModel(smooth, example=x)
    assert linear.mode == "jvp"
    with torch.no_grad():
        for name, delta in linear.deltas.items():
            delta.copy_(direction[name])
    torch.testing.assert_close(linear(x).detach() - value, expected, rtol=1e-6, atol=1e-8)


def test_its_kernel_is_the_product_of_its_jacobians(smooth: nn.Module) -> None:
    x = images(3, torch.float64)
    groups = {"body": [n for n, _ in smooth.named_parameters() if not n.startswith("fc.")]}
    groups["head"] = ["fc.weight", "fc.bias"]
    jacobian = dense_jacobian(smooth, x)
    linear = LinearizedModel(smooth, example=x)
    found = assemble_kernel(linear, groups, [x[:2], x[2:]]).train
    for group, names in groups.items():
        rows = torch.cat([jacobian[name].flatten(2) for name in names], 2).flatten(0, 1)
        torch.testing.assert_close(found.groups[group][0], rows @ rows.T, rtol=1e-8, atol=1e-8)
