from pathlib import Path

import pytest
import safetensors.torch
import torch

from lqf_lightning.backbones.weight_file import read_weight_file


def _whole(folder: Path, suffix: str) -> Path:
    path, state = folder / f"weights{suffix}", {"a": torch.arange(2000.0)}
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)
    return path


def test_values_beside_tensors_are_read(tmp_path: Path) -> None:
    content = read_weight_file(_whole(tmp_path, ".ckpt"))
    assert content["epoch"] == 3
    assert torch.equal(content["state_dict"]["a"], torch.arange(2000.0))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 30, 500, 5000, -1])
def test_a_file_that_breaks_off_is_named(tmp_path: Path, suffix: str, kept: int) -> None:
    path = _whole(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path} cannot be read; it is damaged, or was not written to its end"):
        read_weight_file(path)


@pytest.mark.parametrize(
    "content", [b"hello world", b"<html>not found</html>", b"\0" * 500, b"version https://git-lfs"]
)
def test_other_files_are_not_taken_for_objects(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} cannot be read; it is damaged"):
        read_weight_file(path)


def test_a_checkpoint_with_foreign_bytes_inside_is_named(tmp_path: Path) -> None:
    path = _whole(tmp_path, ".ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + b"x" * 300 + whole[360:])
    with pytest.raises(ValueError, match=rf"{path} cannot be read"):
        read_weight_file(path)
