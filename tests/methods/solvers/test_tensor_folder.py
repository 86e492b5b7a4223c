import pytest
import torch

from lqf_lightning.methods.solvers.tensor_folder import TensorFolder


def test_what_is_put_in_comes_out_of_another_instance(tmp_path):
    folder = TensorFolder(tmp_path / "new" / "folder")
    tensors = {"a:b/c é": torch.randn(3, 4).T, "n": torch.arange(3), "empty": torch.zeros(0, 2, dtype=torch.float64)}
    folder.update(tensors)
    again = TensorFolder(tmp_path / "new" / "folder")
    assert len(again) == 3
    assert set(again) == set(tensors)
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype
        assert torch.equal(again[key], tensor)


def test_keys_can_be_replaced_and_taken_out(tmp_path):
    folder = TensorFolder(tmp_path)
    folder["k"] = torch.zeros(2)
    folder["k"] = torch.ones(2)
    assert torch.equal(folder["k"], torch.ones(2))
    del folder["k"]
    assert "k" not in folder
    assert list(tmp_path.iterdir()) == []
    for act in (folder.__getitem__, folder.__delitem__):
        with pytest.raises(KeyError, match="k"):
            act("k")


def test_a_file_that_was_not_finished_is_not_there(tmp_path, monkeypatch):
    folder = TensorFolder(tmp_path)

    def half(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lqf_lightning.methods.solvers.tensor_folder.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        folder["k"] = torch.zeros(2)
    assert list(folder) == []
    assert "k" not in folder
