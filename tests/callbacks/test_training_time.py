import json

import pandas as pd
import pytest
import torch
from lqf_lightning.callbacks.training_time import TrainingTime

from lqf_lightning.methods.losses import choose_loss
from ranks import run_on_ranks
from tiny import run_tiny

TARGET = "callbacks.training_time._target_=lqf_lightning.callbacks.training_time.TrainingTime"
PLAIN = ["callbacks=training_time", TARGET, "test=false", "data/augmentation=none"]
DOUBLE = ["trainer.precision=64-true"]
LQF_SGD = ["method=lqf_sgd", "method.preconditioner=null", "method.optimizer.lr=0.2"]
THRESHOLDS = "callbacks.training_time.thresholds=[0.9,0.6,0.3]"


class Caught:
    """The callback of the last run."""

    made = None


@pytest.fixture(autouse=True)
def caught(monkeypatch):
    start = TrainingTime.on_train_start

    def note(self, trainer, module):
        Caught.made = self
        start(self, trainer, module)

    monkeypatch.setattr(TrainingTime, "on_train_start", note)
    return Caught


def report(folder):
    return json.loads((folder / "training_time.json").read_text())


def errors(made):
    predicted, measured = made._predicted, made._curve()
    assert len(predicted) == len(measured)
    return (predicted - measured).abs() / measured[0]


@pytest.mark.parametrize(
    "options",
    [
        ["data.batch_size=24", "trainer.max_epochs=5"],
        ["data.batch_size=10", "trainer.max_epochs=2", "method.optimizer.nesterov=true"],
        ["data.batch_size=10", "trainer.max_epochs=2", "method.normalize_step=false", "method.optimizer.lr=1e-4",
         "method.group_lr={head: 3, stem: 0.5}", "method.group_ridge={head: 4}", "method.ridge=0.1"],
        ["data.batch_size=9", "data.drop_last=true", "trainer.max_epochs=2", "method.loss=cross_entropy"],
    ],
    ids=["all", "batches", "groups", "cross_entropy"],
)  # fmt: skip
def test_the_run_of_a_linear_model_is_foretold_exactly(options, tmp_path, folder_of_shapes, caught):
    metrics = run_tiny(tmp_path, folder_of_shapes, *PLAIN, *DOUBLE, *LQF_SGD, THRESHOLDS, *options)
    assert metrics["train/predicted_loss"] == pytest.approx(metrics["train/loss"], rel=1e-5)
    assert float(errors(caught.made).max()) < 1e-8
    found = report(tmp_path)
    for row in found["thresholds"]:
        assert row["predicted_steps"] == row["measured_steps"]
    assert (tmp_path / "pictures" / "training_time.png").stat().st_size > 1000


def test_samples_count_as_much_as_they_weigh(tmp_path, folder_of_shapes, caught):
    rows = pd.DataFrame({"path": [f"train/red/{n:03d}.png" for n in range(8)], "weight": 3.0})
    rows.to_csv(tmp_path / "weights.csv", index=False)
    options = [*PLAIN, *DOUBLE, *LQF_SGD, f"data.weights={tmp_path / 'weights.csv'}", "trainer.max_epochs=1"]
    run_tiny(tmp_path / "run", folder_of_shapes, *options)
    assert float(errors(caught.made).max()) < 1e-8
    assert float(caught.made._predicted[0]) > 1.2 * 0.5 * 15**2


def test_thresholds_are_found_and_their_errors_reported(tmp_path, folder_of_shapes):
    run_tiny(tmp_path, folder_of_shapes, *PLAIN, *LQF_SGD, THRESHOLDS, "data.batch_size=24", "trainer.max_epochs=14")
    found = report(tmp_path)
    steps = [row["predicted_steps"] for row in found["thresholds"]]
    assert steps == [row["measured_steps"] for row in found["thresholds"]]
    assert steps[0] < steps[1]
    assert None not in steps[:2]
    assert found["median_relative_error"] == 0.0
    assert found["seconds"]["training"] > 0


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_fine_tuning_in_small_steps_follows_its_expansion(loss, tmp_path, folder_of_shapes, caught):
    options = ["method=finetune", f"method.loss={loss}", "method.batch_norm=frozen", "method.optimizer.lr=1e-6"]
    options += ["method.target_scale=1", "method.optimizer.weight_decay=5", "method.optimizer.momentum=0.5"]
    run_tiny(tmp_path, folder_of_shapes, *PLAIN, *DOUBLE, *options, "data.batch_size=10", "trainer.max_epochs=2")
    moved = (caught.made._curve() - caught.made._curve()[0]).abs().max() / caught.made._curve()[0]
    assert float(errors(caught.made).max()) < 0.02 * float(moved)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (["method=lqf_sgd"], r"method\.preconditioner=null"),
        (["method=finetune", "method/optimizer=adamw"], "method/optimizer=sgd"),
        ([*LQF_SGD, "method.optimizer.lr=100", "data.batch_size=24", "trainer.max_epochs=9"], r"method\.optimizer\.lr"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_the_first_step(options, fix, tmp_path, folder_of_shapes):
    with pytest.raises(ValueError, match=fix):
        run_tiny(tmp_path, folder_of_shapes, *PLAIN, *options)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "options", [{"thresholds": [1.5]}, {"thresholds": []}, {"kernel": "best"}, {"largest": 0}, {"memory_gib": -1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"callbacks\.training_time\."):
        TrainingTime(**options)


def test_a_resumed_run_keeps_its_prediction_and_measurements(tmp_path, folder_of_shapes, caught, monkeypatch):
    options = [*PLAIN, *DOUBLE, *LQF_SGD, "trainer.max_epochs=2"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingTime, "on_train_epoch_start", _fail_in_the_second_epoch)
        with pytest.raises(RuntimeError, match="on purpose"):
            run_tiny(tmp_path, folder_of_shapes, *options)
    before = caught.made
    run_tiny(tmp_path, folder_of_shapes, *options)
    assert caught.made is not before
    assert torch.equal(caught.made._predicted, before._predicted)
    assert float(errors(caught.made).max()) < 1e-8
    assert report(tmp_path)["seconds"]["kernel"] == before.report["seconds"]["kernel"]


def test_what_a_checkpoint_held_goes_where_the_model_is(monkeypatch):
    callback, module = TrainingTime(), torch.nn.Module()
    one = torch.ones(2, dtype=torch.float64)
    monkeypatch.setattr(TrainingTime, "_refuse_other_steps", lambda *_: None)
    state = {"report": {"steps": 2}, "predicted": one, "measured": one, "numbers": one, "spent": 1.0}
    callback.load_state_dict(state)
    module.device = torch.device("meta")  # as an accelerator: tensors of two devices do not stack
    callback.on_train_start(None, module)
    assert {value.device.type for value in (*callback._measured, *callback._numbers)} == {"meta"}


def test_a_run_that_goes_on_with_other_steps_has_no_prediction(tmp_path, folder_of_shapes):
    options = [*PLAIN, *LQF_SGD]
    run_tiny(tmp_path, folder_of_shapes, *options, "trainer.max_epochs=1")
    with pytest.raises(ValueError, match=r"trainer\.max_epochs"):
        run_tiny(tmp_path, folder_of_shapes, *options, "trainer.max_epochs=2")
    assert report(tmp_path)["steps"] == 2


def _fail_in_the_second_epoch(self, trainer, module):
    if trainer.current_epoch == 1:
        raise RuntimeError("on purpose")


def test_ranks_measure_the_loss_of_all_their_samples():
    whole = _measure_on(1)
    for result in run_on_ranks(2, _measure_on, 2):
        torch.testing.assert_close(result, whole, rtol=1e-12, atol=0)


def _measure_on(world):
    from types import SimpleNamespace

    rank = torch.distributed.get_rank() if world > 1 else 0
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(7, 3, generator=generator, dtype=torch.float64), torch.arange(7) % 3
    own = slice(rank, None, world)
    loss = choose_loss("cross_entropy", 1.0)
    method = SimpleNamespace(training_loss=lambda logits, batch: loss(logits, batch.target))
    callback = TrainingTime()
    callback.on_train_batch_end(None, method, {"logits": logits[own]}, SimpleNamespace(target=label[own]), 0)
    return callback._curve()
