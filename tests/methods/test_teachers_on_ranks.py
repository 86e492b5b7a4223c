import math

import pytest
import torch

from lqf_lightning.evaluate import evaluate
from tiny import compose, run_tiny

ONE_EPOCH = ("callbacks=[]", "test=false", "trainer.max_epochs=1")


def run(folder, root, world_size, *overrides):
    """One epoch of 24 images, watched on every rank."""
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world_size}", "trainer.strategy=ddp_fork"]
    folder.mkdir(parents=True, exist_ok=True)
    metrics = run_tiny(
        folder, root, *(ranks if world_size > 1 else []), *ONE_EPOCH,
        f"+callbacks.watch={{_target_: methods.paired.Watch, folder: {folder}}}", *overrides,
    )  # fmt: skip
    seen = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
    return metrics, seen


def stored(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


FINETUNE = ("method=finetune", "method.teacher=eman", "method.momentum=0.5", "data.batch_size=6")


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "synchronized"])
def finetuned(request, tmp_path_factory, folder_of_shapes):
    """A teacher that follows fast, on two ranks; also one that the method does not own."""
    folder = tmp_path_factory.mktemp("finetuned")
    synchronized = f"method.sync_statistics={str(request.param).lower()}"
    return folder, request.param, *run(folder, folder_of_shapes, 2, *FINETUNE, synchronized, "method.optimizer.lr=0.05")


def test_weights_of_the_teacher_are_equal_on_all_ranks_without_communication(finetuned):
    *_, (first, second) = finetuned
    assert len(first["steps"]) == len(second["steps"]) == 4
    for one, other in zip(first["steps"], second["steps"], strict=True):
        assert equal(one["weights"], other["weights"])


def test_statistics_of_the_teacher_agree_after_the_next_forward_because_the_method_owns_it(finetuned):
    _, synchronized, _, (first, second) = finetuned
    for number, (one, other) in enumerate(zip(first["steps"], second["steps"], strict=True)):
        assert equal(one["inside"], other["inside"])
        assert equal(one["buffers"], other["buffers"]) == synchronized
        # nobody broadcasts those of a teacher outside; it is never synchronized here
        assert equal(one["outside"], other["outside"]) == (number == 0)


def test_evaluation_on_one_rank_gives_what_two_reported(finetuned, tmp_path):
    folder, _, metrics, _ = finetuned
    config = compose(
        f"checkpoint={folder}/checkpoints/last.ckpt", "split=val", "progress=none", "callbacks=[]",
        f"paths.output_dir={tmp_path}", name="eval",
    )  # fmt: skip
    got = evaluate(config)
    for name in ("val/loss", "val/acc", "val/teacher_loss", "val/teacher_acc"):
        assert got[name] == pytest.approx(metrics[name], rel=1e-5), name
    assert got["val/loss"] != pytest.approx(got["val/teacher_loss"], rel=1e-4)


QUEUE = ("method.queue_size=18", "data.batch_size=6", "method.momentum=0.9", "method.optimizer.lr=0.03")


@pytest.fixture(scope="module", params=[("moco", 2), ("moco", 3), ("supmoco", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def contrasted(request, tmp_path_factory, folder_of_shapes):
    """Four steps, more than an unused parameter would let DDP take; with three ranks, few have a label."""
    name, world_size = request.param
    folder = tmp_path_factory.mktemp(name)
    return folder, run(folder, folder_of_shapes, world_size, f"method={name}", *QUEUE, "data.labels_per_class=1")


def test_the_queue_holds_the_last_keys_of_all_ranks(contrasted):
    _, (_, seen) = contrasted
    keys, labels = seen[0]["first queue"].clone(), torch.full((18,), -1)
    row = 0
    for step in range(4):
        for rank in seen:
            for key, label in zip(rank["keys"][step], rank["labels"][step], strict=True):
                keys[row % 18], labels[row % 18] = key, label
                row += 1
    assert row == 24
    assert sum(int((rank_labels >= 0).sum()) for rank in seen for rank_labels in rank["labels"]) == 3
    for rank in seen:
        assert torch.equal(rank["queue"]["keys"], keys)
        assert torch.equal(rank["queue"]["labels"], labels)
        assert rank["position"] == 24 % 18
    assert len({tuple(rank["keys"][0].flatten().tolist()) for rank in seen}) == len(seen)


def test_the_queue_is_not_broadcast(contrasted):
    _, (_, seen) = contrasted
    for rank in seen:
        assert rank["ignored"] == ["queue.keys", "queue.labels"]
        assert any(
            name.startswith("teacher.model.model.") and name.endswith("running_mean") for name in rank["broadcast"]
        )
        assert not any("queue" in name for name in rank["broadcast"])


def test_ranks_whose_batch_has_no_label_neither_hang_nor_spoil_the_others(contrasted):
    folder, (metrics, seen) = contrasted
    without = [not (labels >= 0).any() for rank in seen for labels in rank["labels"]]
    assert any(without)
    assert all(math.isfinite(loss) for rank in seen for loss in rank["losses"])
    assert 0 <= metrics["train/acc"] <= 1
    assert all(value.isfinite().all() for name, value in stored(folder)["state_dict"].items() if "_extra" not in name)


def test_byol_leaves_no_parameter_without_a_gradient(tmp_path, folder_of_shapes):
    options = ("method.hidden_width=16", "method.projection_width=8", "method.optimizer.lr=0.1", "data.batch_size=6")
    _, (first, second) = run(tmp_path, folder_of_shapes, 2, "method=byol", *options, "method.sync_statistics=true")
    assert len(first["steps"]) == 4
    for one, other in zip(first["steps"], second["steps"], strict=True):
        assert equal(one["weights"], other["weights"])
        assert equal(one["buffers"], other["buffers"])


FIXMATCH = (  # adaptive steps would amplify rounding
    "method=fixmatch", "method/optimizer=sgd", "data.batch_size=6", "method.unlabeled_ratio=2",
    "data.labels_per_class=2",
    "method.threshold=0.3", "method.momentum=0.5", "method.optimizer.lr=0.01", "method.batch_norm=frozen",
)  # fmt: skip


@pytest.fixture(scope="module")
def matched(tmp_path_factory, folder_of_shapes):
    root = tmp_path_factory.mktemp("matched")
    for world_size in (1, 2, 3):
        metrics, _ = run(root / str(world_size), folder_of_shapes, world_size, *FIXMATCH)
        torch.save(metrics, root / str(world_size) / "metrics.pt")
    return root


@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_and_metrics_do_not_depend_on_the_number_of_ranks(matched, world_size):
    single, many = (stored(matched / str(size))["state_dict"] for size in (1, world_size))
    assert single.keys() == many.keys()
    for name, value in single.items():
        scale = value.double().abs().max().clamp(min=1e-3)
        assert (value.double() - many[name].double()).abs().max() <= 1e-5 * scale, name
    single, many = (torch.load(matched / str(size) / "metrics.pt") for size in (1, world_size))
    assert 0 < single["train/selected"] <= 1
    assert single["train/unlabeled_loss"] > 0
    for name, value in single.items():
        if not name.startswith("time/"):
            assert many[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
