import pytest
import torch

from tiny import run_tiny

METHODS = {
    "finetune": ["method=finetune", "method.teacher=eman", "method.momentum_schedule=cosine"],
    "moco": ["method=moco", "method.queue_size=16", "method.momentum_warmup=true"],
    "byol": ["method=byol", "method.hidden_width=16", "method.projection_width=8", "method.optimizer.lr=0.1"],
    "fixmatch": ["method=fixmatch", "method.unlabeled_ratio=2", "data.labels_per_class=2", "method.threshold=0.3"],
}
STEPS = {"finetune": 6, "moco": 6, "byol": 6, "fixmatch": 3}  # of an epoch: 24 images in fours, or in eights


def run(folder, root, name, *overrides):
    return run_tiny(
        folder, root, *METHODS[name], "data.batch_size=4", "data/augmentation=randaugment", "callbacks=[]",
        "test=false", *overrides,
    )  # fmt: skip


def stored(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module", params=METHODS)
def whole(request, tmp_path_factory, folder_of_shapes):
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, folder_of_shapes, request.param)
    return request.param, stored(folder)


CRASH = "+callbacks.crash={_target_: methods.paired.CrashAtStep, step: %d}"


@pytest.mark.parametrize("where", ["middle", "end"])
def test_an_interrupted_run_ends_with_the_same_state(where, whole, tmp_path, folder_of_shapes):
    name, expected = whole
    in_epoch = STEPS[name]
    saving, last = [], in_epoch
    if where == "middle":
        every = 2 if name == "fixmatch" else 4
        saving = ["checkpoints.last.save_on_train_epoch_end=false", f"+checkpoints.last.every_n_train_steps={every}"]
        last = 2 * every  # in the second epoch, before its end
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(tmp_path, folder_of_shapes, name, *saving, CRASH % (last + 1))
    assert stored(tmp_path)["global_step"] == last
    run(tmp_path, folder_of_shapes, name, *saving)
    got = stored(tmp_path)
    assert got["global_step"] == expected["global_step"] == 2 * in_epoch
    compare(got["state_dict"], expected["state_dict"])
    for mine, theirs in zip(got["optimizer_states"], expected["optimizer_states"], strict=True):
        compare(mine["state"], theirs["state"])


def compare(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            compare(got[name], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


def test_the_state_of_a_run_holds_what_its_teacher_and_its_queue_need(whole):
    name, checkpoint = whole
    state = checkpoint["state_dict"]
    assert state["teacher._extra_state"] == 2 * STEPS[name]
    if name == "moco":
        assert state["queue._extra_state"].tolist() == [48 % 16, 16]
        assert state["queue.keys"].shape == (16, 128)
        assert checkpoint["random_state"].dtype == torch.uint8
