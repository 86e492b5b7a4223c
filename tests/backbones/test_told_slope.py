import json

import pytest
import safetensors.torch
import timm

from lqf_lightning.backbones import create_backbone


def stored(folder, **told):
    """A plain state dict of a network whose metadata say something of its activations."""
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    path = folder / "net.safetensors"
    safetensors.torch.save_file(state, path, {name: json.dumps(value) for name, value in told.items()})
    return path


@pytest.mark.parametrize(("slope", "got"), [(None, "null"), (0.2, r"0\.2"), (0, "0")])
def test_weights_of_a_leaky_network_are_refused_with_another_slope(tmp_path, slope, got):
    path = stored(tmp_path, lqf_lightning="1", leaky_slope=0.1)
    complaint = rf"slope 0\.1, got backbone\.leaky_slope={got}: .*Set backbone\.leaky_slope=0\.1"
    with pytest.raises(ValueError, match=complaint):
        create_backbone("test_resnet", 3, library="timm", weights=path, leaky_slope=slope)
    with pytest.raises(ValueError, match=complaint):  # as Hydra hands paths over
        create_backbone("test_resnet", 3, library="timm", weights=str(path), leaky_slope=slope)


def test_weights_are_loaded_with_their_own_slope(tmp_path):
    path = stored(tmp_path, lqf_lightning="1", leaky_slope=0.1)
    backbone = create_backbone("test_resnet", 3, library="timm", weights=path, leaky_slope=0.1)
    assert backbone.weights.startswith(f"file {path}")


@pytest.mark.parametrize("told", [{}, {"lqf_lightning": "1"}, {"leaky_slope": 0.5}])
def test_files_of_plain_networks_and_of_others_take_any_slope(tmp_path, told):
    path = stored(tmp_path, **told)
    for slope in (None, 0.1):
        create_backbone("test_resnet", 3, library="timm", weights=path, leaky_slope=slope)


def test_a_damaged_file_is_told_as_such(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read; it is damaged"):
        create_backbone("test_resnet", 3, library="timm", weights=path)
