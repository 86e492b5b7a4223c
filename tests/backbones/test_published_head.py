import json

import pytest
import safetensors.torch
import timm
import torch

from lqf_lightning.backbones.library import find_architecture
from lqf_lightning.backbones.published_head import PublishedHead, published_head


def resnet(classes):
    return timm.create_model("test_resnet", num_classes=classes).state_dict()


@pytest.mark.parametrize(
    ("name", "library", "weights", "outputs"),
    [
        ("tf_efficientnet_lite0", "timm", "package", 1000),
        ("resnet18", "torchvision", "default", 1000),
        ("resnetv2_50x1_bit.goog_in21k", "timm", "default", 21843),
        ("convnext_small.dinov3_lvd1689m", "timm", "default", 0),
    ],
)
def test_libraries_know_the_outputs_of_what_they_publish(name, library, weights, outputs):
    assert published_head(find_architecture(name, library), weights) == PublishedHead(outputs)


@pytest.mark.parametrize("wrapped", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_file_tells_by_the_shape_of_its_last_layer(tmp_path, wrapped):
    architecture = find_architecture("test_resnet", "timm")
    torch.save(wrapped(resnet(7)), tmp_path / "net.pt")
    assert published_head(architecture, tmp_path / "net.pt") == PublishedHead(7)
    torch.save(wrapped(resnet(0)), tmp_path / "body.pt")
    assert published_head(architecture, tmp_path / "body.pt") == PublishedHead(0)


def test_an_exported_file_tells_the_names_too(tmp_path):
    path, classes = tmp_path / "net.safetensors", ["blue", "red"]
    safetensors.torch.save_file(resnet(2), path, {"lqf_lightning": "1", "classes": json.dumps(classes)})
    assert published_head(find_architecture("test_resnet", "timm"), path) == PublishedHead(2, ("blue", "red"))


def test_of_a_checkpoint_of_a_run_an_untrained_head_does_not_count(tmp_path):
    architecture, path = find_architecture("test_resnet", "timm"), tmp_path / "last.ckpt"
    content = {
        "state_dict": {f"model.{k}": v for k, v in resnet(2).items()}, "networks": {"student": "model."},
        "hyper_parameters": {"classes": ["a", "b"]},
    }  # fmt: skip
    torch.save(content | {"head_is_trained": True}, path)
    assert published_head(architecture, path) == PublishedHead(2, ("a", "b"))
    torch.save(content | {"head_is_trained": False}, path)
    assert published_head(architecture, f"{path}@student") == PublishedHead(0)
