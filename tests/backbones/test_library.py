import pytest
import timm.models
import torchvision.models

from lqf_lightning.backbones.library import find_architecture


def test_a_shared_name_means_torchvision_unless_timm_is_asked_for() -> None:
    assert isinstance(find_architecture("resnet18").build(3, None), torchvision.models.ResNet)
    assert isinstance(find_architecture("resnet18", "timm").build(3, None), timm.models.ResNet)


def test_a_timm_tag_selects_timm_and_its_normalization() -> None:
    tagged = find_architecture("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert (tagged.library, tagged.mean, tagged.fixed_size) == ("timm", (0.5, 0.5, 0.5), True)


def test_an_unknown_name_is_answered_with_the_nearest_of_both_libraries() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name=resnet51, which timm and torch") as error:
        find_architecture("resnet51")
    timm_names, torchvision_names = str(error.value).split("timm: ")[1].split("; torchvision: ")
    assert "resnet50" in timm_names
    assert "resnet50" in torchvision_names


def test_a_name_of_the_other_library_only_is_refused_with_its_home() -> None:
    with pytest.raises(ValueError, match=r"which torchvision cannot provide.* timm: tf_efficientnet_lite0"):
        find_architecture("tf_efficientnet_lite0", "torchvision")


def test_an_unknown_tag_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name=resnet18\.nope, expected .*resnet18\.a1_in1k"):
        find_architecture("resnet18.nope")


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.library=keras, expected timm, torchvision or null"):
        find_architecture("resnet18", "keras")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_networks_with_auxiliary_heads_are_not_offered(name: str) -> None:
    with pytest.raises(ValueError, match="torchvision cannot provide"):
        find_architecture(name, "torchvision")
