import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from lqf_lightning.backbones import create_backbone
from lqf_lightning.backbones.run_checkpoint import network_in_run, split_part

CLASSES = ["blue", "green", "red"]
PARTS = {"student": "student.model.", "teacher": "teacher.model.model."}


def _weights(value: float) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torchvision.models.resnet18(num_classes=3).state_dict()
    return {key: torch.full_like(tensor, value) for key, tensor in state.items()}


def _self_supervised(**changes: Any) -> dict[str, Any]:
    """What a run with a teacher, a projector and a key queue saves; the student is all ones, the teacher all twos."""
    state = {PARTS["student"] + key: tensor for key, tensor in _weights(1.0).items()}
    state |= {PARTS["teacher"] + key: tensor for key, tensor in _weights(2.0).items()}
    state |= {"student.projector.0.weight": torch.ones(4, 512), "queue.keys": torch.ones(8, 4)}
    content = {"state_dict": state, "hyper_parameters": {"classes": CLASSES}, "networks": PARTS}
    return content | {"head_is_trained": False, "epoch": 3, "callbacks": {}} | changes


def _finetuned(**changes: Any) -> dict[str, Any]:
    """What an ordinary run saved before checkpoints told their networks."""
    state = {f"model.{key}": tensor for key, tensor in _weights(3.0).items()}
    return {"state_dict": state, "hyper_parameters": {"classes": CLASSES}, "epoch": 3} | changes


def _saved(folder: Path, content: dict[str, Any]) -> Path:
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def _values(model: torch.nn.Module, head: bool) -> set[float]:
    return {v for key, t in model.state_dict().items() if key.startswith("fc.") == head for v in t.unique().tolist()}


@pytest.mark.parametrize(("suffix", "value"), [("", 1.0), ("@student", 1.0), ("@teacher", 2.0), ("#teacher", 2.0)])
def test_a_run_gives_its_student_or_its_teacher(tmp_path: Path, suffix: str, value: float) -> None:
    path = _saved(tmp_path, _self_supervised(head_is_trained=True))
    backbone = create_backbone("resnet18", 3, weights=f"{path}{suffix}")
    assert _values(backbone.model, head=False) == _values(backbone.model, head=True) == {value}
    part = suffix[1:] or "student"
    assert backbone.weights.startswith(f"{part} of {path} (sha256 ")


def test_a_head_that_was_never_trained_is_left_out(tmp_path: Path) -> None:
    path = _saved(tmp_path, _self_supervised())
    torch.manual_seed(5)
    expected = create_backbone("resnet18", 3, weights=None).model.get_parameter("fc.weight")
    torch.manual_seed(5)
    backbone = create_backbone("resnet18", 3, weights=path)
    assert _values(backbone.model, head=False) == {1.0}
    assert torch.equal(backbone.model.get_parameter("fc.weight"), expected)
    assert torch.count_nonzero(backbone.model.get_parameter("fc.bias")) == 0


def test_a_checkpoint_that_does_not_tell_its_networks_loads_as_before(tmp_path: Path) -> None:
    backbone = create_backbone("resnet18", 3, weights=_saved(tmp_path, _finetuned()))
    assert _values(backbone.model, head=False) == _values(backbone.model, head=True) == {3.0}


@pytest.mark.parametrize(
    ("content", "classes", "told"),
    [
        (_self_supervised(head_is_trained=True), 3, True),
        (_finetuned(), 3, True),
        (_self_supervised(), 3, False),  # the head is new
        (_self_supervised(head_is_trained=True), 4, False),
    ],
)
def test_the_log_tells_what_a_loaded_head_tells_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict[str, Any], classes: int, told: bool
) -> None:
    with caplog.at_level(logging.INFO, "lqf_lightning"):
        create_backbone("resnet18", classes, weights=_saved(tmp_path, content))
    assert ("the loaded head tells apart, in this order: blue, green, red" in caplog.text) == told


@pytest.mark.parametrize(
    "content",
    [
        _self_supervised(networks={}),
        _finetuned(state_dict={"linearized.model.conv1.weight": torch.ones(1), "linearized.deltas.0": torch.ones(1)}),
    ],
)
def test_a_linearized_network_is_refused_with_what_it_is_good_for(tmp_path: Path, content: dict[str, Any]) -> None:
    path = _saved(tmp_path, content)
    with pytest.raises(ValueError, match=rf"linearized network.*lqf-eval checkpoint={path}.*reference={path}"):
        create_backbone("resnet18", 3, weights=path)


def test_a_part_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    path = _saved(tmp_path, _self_supervised())
    with pytest.raises(ValueError, match=r"no part 'projector', only student, teacher\. Set backbone\.weights=.*@stud"):
        create_backbone("resnet18", 3, weights=f"{path}@projector")
    _saved(tmp_path, _finetuned())
    with pytest.raises(ValueError, match=r"no part 'teacher', only student\. "):
        create_backbone("resnet18", 3, weights=f"{path}@teacher")
    torch.save(_weights(1.0), path)
    with pytest.raises(ValueError, match=rf"is no checkpoint of a run, so it has no part 'teacher'.*weights={path}$"):
        create_backbone("resnet18", 3, weights=f"{path}@teacher")


def test_a_promised_network_without_tensors_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, _self_supervised(networks={"student": "online.model."}))
    with pytest.raises(ValueError, match=r"promises its student under 'online\.model\.' but holds no such tensor"):
        create_backbone("resnet18", 3, weights=path)


def test_another_architecture_is_answered_with_the_override(tmp_path: Path) -> None:
    path = _saved(tmp_path, _self_supervised())
    with pytest.raises(ValueError, match=r"last\.ckpt do not fit.*layer1\.0\.conv3.*Set backbone\.name"):
        create_backbone("resnet50", 3, weights=path)


def test_only_checkpoints_name_parts_and_existing_files_are_taken_at_their_word(tmp_path: Path) -> None:
    assert split_part(Path("a/last.ckpt#")) == (Path("a/last.ckpt"), "")
    assert split_part(Path("a@b/last.ckpt")) == (Path("a@b/last.ckpt"), None)
    assert split_part(Path("a/weights@1.pt")) == (Path("a/weights@1.pt"), None)
    literal = tmp_path / "last.ckpt@teacher"
    assert split_part(literal) == (tmp_path / "last.ckpt", "teacher")
    literal.touch()
    assert split_part(literal) == (literal, None)


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"conv1.weight": torch.ones(1)},
        {"state_dict": {"model.conv1.weight": torch.ones(1)}},
        {"state_dict": {"net.conv1.weight": torch.ones(1)}, "hyper_parameters": {"classes": ["a"]}},
        {"state_dict": {"model.conv1.weight": torch.ones(1)}, "hyper_parameters": {"lr": 0.1}},
    ],
)
def test_files_of_others_are_no_runs(content: Any) -> None:
    assert network_in_run(content, Path("other.ckpt")) is None


def _counting_head(**changes: Any) -> dict[str, Any]:
    """A run whose head answers class n with n + 1 in every weight, and with 10 (n + 1) as its bias."""
    state = {f"model.{key}": tensor for key, tensor in _weights(3.0).items()}
    state["model.fc.weight"] = torch.arange(1.0, 4)[:, None].expand(3, 512).clone()
    state["model.fc.bias"] = 10 * torch.arange(1.0, 4)
    return _finetuned(state_dict=state, **changes)


@pytest.mark.parametrize(
    ("ours", "rows"),
    [(CLASSES, [1, 2, 3]), (["green", "red", "blue"], [2, 3, 1]), (("red", "blue", "green"), [3, 1, 2])],
)
def test_a_head_of_the_same_classes_is_put_into_the_order_of_the_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ours: Sequence[str], rows: list[int]
) -> None:
    path = _saved(tmp_path, _counting_head())
    with caplog.at_level(logging.INFO, "lqf_lightning"):
        model = create_backbone("resnet18", 3, weights=path, classes=ours).model
    expected = torch.tensor(rows, dtype=torch.float32)
    assert torch.equal(model.get_parameter("fc.weight"), expected[:, None].expand(3, 512))
    assert torch.equal(model.get_parameter("fc.bias"), 10 * expected)
    assert _values(model, head=False) == {3.0}
    assert f"the loaded head tells apart, in this order: {', '.join(ours)}" in caplog.text


@pytest.mark.parametrize("ours", [["blue", "green", "black"], ["a", "b", "c"]])
def test_a_head_of_other_classes_is_left_out_though_it_would_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ours: list[str]
) -> None:
    path = _saved(tmp_path, _counting_head())
    torch.manual_seed(5)
    expected = create_backbone("resnet18", 3, weights=None).model.get_parameter("fc.weight")
    torch.manual_seed(5)
    with caplog.at_level(logging.INFO, "lqf_lightning"):
        model = create_backbone("resnet18", 3, weights=path, classes=ours).model
    assert torch.equal(model.get_parameter("fc.weight"), expected)
    assert torch.count_nonzero(model.get_parameter("fc.bias")) == 0
    assert _values(model, head=False) == {3.0}
    assert f"tells apart blue, green, red; the data have {', '.join(ours)}: it is left out" in caplog.text
    assert "the loaded head" not in caplog.text


def test_long_lists_of_classes_are_shortened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _saved(tmp_path, _counting_head())
    with caplog.at_level(logging.INFO, "lqf_lightning"):
        create_backbone("resnet18", 9, weights=path, classes=list("abcdefghi"))
    assert "the data have a, b, c, d, e, f, ...: it is left out" in caplog.text


@pytest.mark.parametrize("changes", [{"hyper_parameters": {"classes": []}}, {"networks": {"student": "model."}}])
def test_a_head_is_taken_as_it_is_where_one_side_names_no_classes(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = _saved(tmp_path, _counting_head(**changes))
    ours = ["a", "b", "c"] if "hyper_parameters" in changes else None
    model = create_backbone("resnet18", 3, weights=path, classes=ours).model
    assert model.get_parameter("fc.bias").tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("metadata", "bias"),
    [
        ({"lqf_lightning": "1.0", "classes": '["blue", "green", "red"]'}, [30, 10, 20]),
        ({"lqf_lightning": "1.0", "classes": '["blue", "green", "black"]'}, [0, 0, 0]),
        ({"classes": "something of others"}, [10, 20, 30]),
        (None, [10, 20, 30]),
    ],
)
def test_exported_files_tell_their_classes(tmp_path: Path, metadata: dict[str, str] | None, bias: list[int]) -> None:
    state = {key.removeprefix("model."): t for key, t in _counting_head()["state_dict"].items()}
    safetensors.torch.save_file(state, tmp_path / "student.safetensors", metadata)
    backbone = create_backbone(
        "resnet18", 3, weights=tmp_path / "student.safetensors", classes=["red", "blue", "green"]
    )
    assert backbone.model.get_parameter("fc.bias").tolist() == bias
    assert backbone.weights.startswith(f"file {tmp_path}/student.safetensors (sha256 ")


def test_the_names_of_the_classes_are_as_many_as_the_outputs() -> None:
    with pytest.raises(ValueError, match=r"num_classes=3, but the names of 2 classes"):
        create_backbone("resnet18", 3, weights=None, classes=["a", "b"])
