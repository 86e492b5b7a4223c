import pytest
import torch
from lightning import Trainer

from deletion.run_folders import snapshot
from lqf_lightning.deletion.checkpoint import scrubbed_checkpoint, write_checkpoint
from lqf_lightning.deletion.content_hash import tensors_hash
from lqf_lightning.train import build_method
from tiny import compose, run_tiny, tiny_overrides

CONTENT = {
    "epoch": 1, "global_step": 4, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {"ridge": "auto"},
    "ridge": 0.1, "networks": {"plain": "model."}, "optimizer_states": [1], "lr_schedulers": [1], "loops": {"a": 1},
    "callbacks": {"Ledger": {"index": [1]}}, "solver": {"v": 1}, "random_state": 0, "later_addition": {"rows": [1]},
    "state_dict": {"dw.w": torch.zeros(2), "dw.b": torch.zeros(1), "model.w": torch.ones(2), "queue": torch.ones(3)},
}  # fmt: skip
LINEAR = ["method=lqf_sgd", "method.layers=[head]", "trainer.max_epochs=1", "callbacks=[]"]
NEW = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor([3.0])}


def test_only_what_is_known_to_name_no_sample_is_kept():
    scrubbed = scrubbed_checkpoint(CONTENT, NEW, "dw.")
    assert set(scrubbed) == {
        "epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "ridge", "networks", "state_dict"
    }  # fmt: skip
    assert scrubbed["ridge"] == 0.1
    assert CONTENT["state_dict"]["dw.w"].tolist() == [0, 0]  # the old one is what it was


def test_new_weights_take_the_place_and_type_of_the_old():
    state = scrubbed_checkpoint(CONTENT, NEW, "dw.", {"queue": torch.zeros(3)})["state_dict"]
    assert {name: value.tolist() for name, value in state.items()} == {
        "dw.w": [1, 2], "dw.b": [3], "model.w": [1, 1], "queue": [0, 0, 0]
    }  # fmt: skip
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_weights_that_are_views_leave_nothing_else_in_the_file(tmp_path):
    everything = torch.arange(100_000.0)
    write_checkpoint(scrubbed_checkpoint(CONTENT, NEW | {"w": everything[:2]}, "dw."), tmp_path / "c" / "new.ckpt")
    assert (tmp_path / "c" / "new.ckpt").stat().st_size < 10_000


def test_entries_that_learned_and_would_stay_are_refused():
    start = {name: torch.zeros_like(value) for name, value in CONTENT["state_dict"].items()} | {
        "model.w": torch.ones(2)
    }
    with pytest.raises(ValueError, match=r"1 entries .* not what they were before training.*: queue\."):
        scrubbed_checkpoint(CONTENT, NEW, "dw.", start=start)
    scrubbed_checkpoint(CONTENT, NEW, "dw.", {"queue": torch.zeros(3)}, start)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(KeyError, match=r"no dw\.c \(1 of 1"):
        scrubbed_checkpoint(CONTENT, {"c": torch.zeros(1)}, "dw.")
    with pytest.raises(ValueError, match=r"dw\.b has the shape \(2,\), expected \(1,\)"):
        scrubbed_checkpoint(CONTENT, {"b": torch.zeros(2)}, "dw.")


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    before = snapshot(tmp_path)

    def fails(content, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({}, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == next(iter(before.values()))


def test_lightning_tests_the_new_weights_of_a_linear_model(tmp_path, folder_of_shapes):
    run_tiny(tmp_path / "run", folder_of_shapes, *LINEAR)
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    data, method = build_method(compose(*tiny_overrides(folder_of_shapes), *LINEAR))
    weights = {name: torch.zeros_like(value) for name, value in method.trained().items()}
    start = method.state_dict()
    scrubbed = scrubbed_checkpoint(content, weights, "linearized.dw.", start=start)
    assert tensors_hash(scrubbed["state_dict"]) == tensors_hash(start)  # forgetting everything: the pre-trained model
    write_checkpoint(scrubbed, tmp_path / "new.ckpt")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, use_distributed_sampler=False, default_root_dir=tmp_path)
    options = {"datamodule": data, "weights_only": True, "verbose": False}
    found = trainer.test(method, ckpt_path=tmp_path / "new.ckpt", **options)
    fresh = trainer.test(build_method(compose(*tiny_overrides(folder_of_shapes), *LINEAR))[1], **options)
    assert found == fresh
