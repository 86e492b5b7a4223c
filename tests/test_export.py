import hashlib
import json
import shutil
from importlib.metadata import version

import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from omegaconf import OmegaConf

from lqf_lightning.backbones import create_backbone
from lqf_lightning.export import export
from tiny import compose, run_tiny

CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder_of_shapes):
    """A finished run of an ordinary network."""
    folder = tmp_path_factory.mktemp("exported")
    run_tiny(folder, folder_of_shapes, "method=finetune", "callbacks=[]", "trainer.max_epochs=1", "test=false")
    return folder


@pytest.fixture(scope="module")
def with_teacher(run, tmp_path_factory):
    """The same run, had its method kept an averaged teacher and left the head alone."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("taught") / "run")
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    student = trained(run)
    state = {f"student.model.{key}": tensor for key, tensor in student.items()}
    state |= {f"teacher.model.model.{k}": t / 2 if t.is_floating_point() else t for k, t in student.items()}
    content["state_dict"] = state | {"student.projector.weight": torch.ones(4, 64), "queue.keys": torch.ones(8, 4)}
    content["networks"] = {"student": "student.model.", "teacher": "teacher.model.model."}
    content["head_is_trained"] = False
    torch.save(content, path)
    return folder


def written(run, tmp_path, *overrides):
    options = [f"checkpoint={run}/checkpoints/last.ckpt", f"output={tmp_path}/network.safetensors", *overrides]
    return export(compose(*options, name="export"))


def metadata(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def trained(run):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    prefix = content.get("networks", {"student": "model."})["student"]
    state = content["state_dict"]
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def store(run, state, head_is_trained=True):
    """Give the run's last checkpoint another network."""
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {f"model.{key}": tensor for key, tensor in state.items()}
    torch.save(content | {"networks": {"student": "model."}, "head_is_trained": head_is_trained}, path)


def changed(run, folder, **options):
    """A copy of the run whose configuration says something else about its network."""
    copy = shutil.copytree(run, folder)
    config = OmegaConf.load(copy / "config.yaml")
    config.backbone.update(options)
    OmegaConf.save(config, copy / "config.yaml")
    return copy


def test_a_fresh_network_of_the_library_gives_the_runs_outputs(run, tmp_path):
    path = written(run, tmp_path)
    library = timm.create_model("test_resnet", num_classes=3).eval()
    library.load_state_dict(safetensors.torch.load_file(path), strict=True)
    ours = create_backbone("test_resnet", 3, library="timm", weights=None)
    ours.model.load_state_dict(trained(run))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(library(images), ours.model(images))


def test_an_exported_file_starts_another_run(run, tmp_path):
    path = written(run, tmp_path)
    backbone = create_backbone("test_resnet", 3, library="timm", weights=path)
    own, expected = backbone.model.state_dict(), trained(run)
    assert all(torch.equal(own[key], expected[key]) for key in own)


def test_the_file_tells_what_it_is(run, tmp_path):
    told = metadata(written(run, tmp_path))
    digest = hashlib.sha256((run / "checkpoints" / "last.ckpt").read_bytes()).hexdigest()
    config = timm.get_pretrained_cfg("test_resnet")
    assert {name: told[name] for name in ("format", "architecture", "library", "part")} == {
        "format": "pt", "architecture": "test_resnet", "library": "timm", "part": "student",
    }  # fmt: skip
    assert told["checkpoint_sha256"] == digest
    assert told["method"] == "lqf_lightning.methods.Finetune"
    assert told["lqf_lightning"] == version("lqf-lightning")
    parsed = {name: json.loads(told[name]) for name in ("mean", "std", "image_size", "classes")}
    assert parsed == {"mean": list(config.mean), "std": list(config.std), "image_size": 32, "classes": CLASSES}


def test_the_teacher_is_another_network_and_an_untrained_head_stays_behind(with_teacher, tmp_path):
    student = safetensors.torch.load_file(written(with_teacher, tmp_path))
    teacher = safetensors.torch.load_file(written(with_teacher, tmp_path / "2", "part=teacher"))
    body = timm.create_model("test_resnet", num_classes=0)  # no head
    assert set(student) == set(teacher) == set(body.state_dict())
    for key, tensor in student.items():
        assert torch.equal(teacher[key], tensor / 2 if tensor.is_floating_point() else tensor)
    assert "classes" not in metadata(tmp_path / "network.safetensors")
    assert metadata(tmp_path / "2" / "network.safetensors")["part"] == "teacher"


def test_an_exported_body_gives_the_features_of_the_run(with_teacher, tmp_path):
    path = written(with_teacher, tmp_path)
    body = timm.create_model("test_resnet", num_classes=0).eval()
    body.load_state_dict(safetensors.torch.load_file(path), strict=True)
    direct = create_backbone("test_resnet", 5, library="timm", weights=with_teacher / "checkpoints" / "last.ckpt")
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = direct.model.forward_head(direct.model.forward_features(images), pre_logits=True)
        assert torch.equal(body(images), expected)


@pytest.mark.parametrize(
    ("name", "library", "size", "head", "line"),
    [
        ("test_resnet", "timm", 32, True, "timm.create_model('test_resnet', num_classes=3)"),
        ("test_resnet", "timm", 32, False, "timm.create_model('test_resnet', num_classes=0)"),
        ("test_vit", "timm", 32, False, "timm.create_model('test_vit', num_classes=0, img_size=32)"),
        ("test_vit", "timm", None, True, "timm.create_model('test_vit', num_classes=3, img_size=160)"),
        ("shufflenet_v2_x0_5", "torchvision", 32, False, "torchvision.models.get_model('shufflenet_v2_x0_5')"),
        ("shufflenet_v2_x0_5", None, 32, True, "torchvision.models.get_model('shufflenet_v2_x0_5', num_classes=3)"),
    ],
)
def test_the_printed_lines_of_python_work(name, library, size, head, line, run, tmp_path, capsys):
    copy = changed(run, tmp_path / "run", name=name, library=library, image_size=size)
    state = create_backbone(name, 3, library=library, weights=None, image_size=size).model.state_dict()
    store(copy, state, head)
    path = written(copy, tmp_path)
    lines = [text.strip() for text in capsys.readouterr().out.splitlines() if text.startswith("  model")]
    assert lines[0] == f"model = {line}"
    names = {"timm": timm, "torchvision": torchvision, "safetensors": safetensors}
    exec("\n".join(lines), names)
    loaded, keys = names["model"].state_dict(), set(safetensors.torch.load_file(path))
    assert all(torch.equal(loaded[key], state[key]) for key in keys)
    assert len(state) - len(keys) == (0 if head else 2)  # weight and bias


def test_changes_that_keys_do_not_show_are_told(run, tmp_path, capsys):
    options = {"leaky_slope": 0.1, "mean": [0.1, 0.2, 0.3]}
    told = metadata(written(changed(run, tmp_path / "run", **options), tmp_path))
    assert (json.loads(told["leaky_slope"]), json.loads(told["mean"])) == (0.1, [0.1, 0.2, 0.3])
    assert "stride_in_1x1" not in told
    printed = capsys.readouterr().out
    assert "backbone.mean=[0.1,0.2,0.3] backbone.leaky_slope=0.1 " in printed
    assert "{'leaky_slope': 0.1}, which a fresh one of the library lacks" in printed


def test_a_folded_network_is_refused(run, tmp_path):
    folded = changed(run, tmp_path / "run", fold_batch_norm=True)
    model = create_backbone("test_resnet", 3, library="timm", weights=None, fold_batch_norm=True).model
    store(folded, model.state_dict())
    with pytest.raises(
        ValueError, match=r"fold_batch_norm=true made batch norms part.*run with backbone\.fold_batch_n"
    ):
        written(folded, tmp_path)


def test_a_network_under_another_name_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"no plain resnet18 of timm: its tensors are not those.*differ: bn1\.bias"):
        written(changed(run, tmp_path / "run", name="resnet18"), tmp_path)


def test_the_file_goes_into_the_run_folder_and_is_not_overwritten_unasked(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    asked = [f"checkpoint={copy}/checkpoints/last.ckpt"]
    path = export(compose(*asked, name="export"))
    assert path == copy / "student.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"student\.safetensors exists\. Set overwrite=true"):
        export(compose(*asked, name="export"))
    assert path.read_bytes() == b"precious"
    export(compose(*asked, "overwrite=true", name="export"))
    assert metadata(path)["part"] == "student"
    assert not list(copy.glob("*.partial"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["part=teacher"], r"no part 'teacher', only student.*in lqf-export: part=student"),
        (["part=null"], r"no part 'None', only student"),
        (["output=network.pt"], r"must end in \.safetensors, got .*network\.pt\. Set output=network\.safetensors"),
    ],
)
def test_what_cannot_be_is_answered_with_the_override(run, tmp_path, overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        written(run, tmp_path, *overrides)
    assert not list(tmp_path.iterdir())


def test_linearized_and_foreign_checkpoints_are_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"networks": {}}, path)
    with pytest.raises(ValueError, match="is of a linearized network"):
        written(copy, tmp_path)
    torch.save({"state_dict": trained(run)}, path)
    with pytest.raises(ValueError, match=r"is no checkpoint that lqf-train wrote\. Set checkpoint="):
        written(copy, tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read; it is damaged"):
        written(copy, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last\.ckpt; found \[.*best\.ckpt"):
        written(copy, tmp_path)


def test_the_command_leaves_its_file_and_nothing_else(run, tmp_path, console):
    done = console(
        "python", "-m", "lqf_lightning.export", f"checkpoint={run}/checkpoints/last.ckpt", "output=new/net.safetensors"
    )
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {"new", "new/net.safetensors"}
    assert done.stdout.startswith(f"Written: {tmp_path}/new/net.safetensors (student, a head for 3 classes)")
    assert done.stderr == ""


@pytest.mark.parametrize("pooling", ["second_order", "both"])
def test_a_network_with_another_pooling_is_refused(pooling, run, tmp_path):
    copy = changed(run, tmp_path / "run", pooling=pooling)
    with pytest.raises(ValueError, match=rf"no plain .*backbone\.pooling={pooling} gives its head.*pooling=average"):
        written(copy, tmp_path)
