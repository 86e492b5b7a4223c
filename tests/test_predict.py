import json
import os

import pytest

from lqf_lightning.predict import predict, print_prediction
from tiny import compose, run_tiny, tiny_overrides

TARGET = "callbacks.training_time._target_=lqf_lightning.callbacks.training_time.TrainingTime"
RUN = [
    "method=lqf_sgd", "method.preconditioner=null", "data/augmentation=none", "trainer.max_epochs=20",
    "data.batch_size=24",
    "trainer.precision=64-true", "method.optimizer.lr=0.2",
]  # fmt: skip


def foretell(folder, data, *overrides):
    options = [option for option in tiny_overrides(data) if not option.startswith("callbacks")]
    config = compose(*options, f"paths.output_dir={folder}", "thresholds=[0.9,0.6]", *overrides, name="predict")
    environment = dict(os.environ)
    try:
        return predict(config)
    finally:
        os.environ.clear()
        os.environ.update(environment)


def test_it_tells_what_training_then_takes(tmp_path, folder_of_shapes, capsys):
    found = foretell(tmp_path / "told", folder_of_shapes, *RUN)
    watched = ["callbacks=training_time", TARGET, "callbacks.training_time.thresholds=[0.9,0.6]", "test=false"]
    run_tiny(tmp_path / "trained", folder_of_shapes, *RUN, *watched)
    measured = json.loads((tmp_path / "trained" / "training_time.json").read_text())["thresholds"]
    assert [row["predicted_steps"] for row in found["thresholds"]] == [row["measured_steps"] for row in measured]
    assert found["thresholds"][0]["predicted_steps"] > 0
    assert json.loads((tmp_path / "told" / "training_time.json").read_text())["thresholds"] == found["thresholds"]
    assert not (tmp_path / "told" / "checkpoints").exists()
    assert (tmp_path / "told" / "pictures" / "training_time.png").exists()
    for row in found["thresholds"]:
        if row["predicted_steps"] is not None:
            assert row["predicted_seconds"] == pytest.approx(row["predicted_steps"] * found["seconds"]["per_step"])
    print_prediction(found, tmp_path)
    assert str(found["thresholds"][0]["predicted_steps"]) in capsys.readouterr().out


def test_a_subset_takes_as_many_steps_and_bounds_from_below(tmp_path, folder_of_shapes):
    options = [*RUN, "data.batch_size=6", "trainer.max_epochs=8"]
    whole = foretell(tmp_path / "all", folder_of_shapes, *options)
    part = foretell(tmp_path / "part", folder_of_shapes, *options, "max_samples=12")
    assert (part["samples"], part["used_samples"]) == (24, 12)
    for name in ("steps", "steps_per_epoch"):
        assert part[name] == whole[name]
    assert not any(row["lower_bound"] for row in whole["thresholds"])
    assert any(row["lower_bound"] for row in part["thresholds"])


def test_what_cannot_be_told_is_refused(tmp_path, folder_of_shapes):
    with pytest.raises(ValueError, match=r"method\.preconditioner=null"):
        foretell(tmp_path, folder_of_shapes, "method=lqf_sgd")
    with pytest.raises(ValueError, match="max_samples=200"):
        foretell(tmp_path, folder_of_shapes, *RUN, "max_samples=1")


def test_processes_that_end_leave_their_report(tmp_path, folder_of_shapes):
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp_fork"]
    alone = foretell(tmp_path / "1", folder_of_shapes, *RUN)
    found = foretell(tmp_path / "2", folder_of_shapes, *RUN, *ranks, "trainer.precision=64-true")
    for name in ("steps", "steps_per_epoch", "samples"):
        assert found[name] == alone[name]
    assert found["final_loss"] == pytest.approx(alone["final_loss"], rel=1e-9)
    assert [row["predicted_steps"] for row in found["thresholds"]] == [
        row["predicted_steps"] for row in alone["thresholds"]
    ]


def test_thresholds_of_a_subset_are_fractions_of_its_loss_before_training(tmp_path, folder_of_shapes, monkeypatch):
    given = {}

    def note(*curves, initial, **options):
        given["initial"] = initial
        return []

    monkeypatch.setattr("lqf_lightning.predict.extrapolated_times", note)
    report = foretell(tmp_path, folder_of_shapes, *RUN, "data.batch_size=2", "max_samples=12", "trainer.max_epochs=1")
    assert given["initial"][0] == report["initial_loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shots=5", r"data\.shots=null"),
        ("data.subset=some.csv", r"data\.subset=null"),
        ("+trainer.limit_train_batches=2", r"trainer\.limit_train_batches=1\.0"),
        ("kernel=last_layer", "kernel=auto"),
    ],
)
def test_a_subset_of_a_choice_is_refused_by_name(override, message, tmp_path, folder_of_shapes):
    if "subset" in override:
        named = tmp_path / "some.csv"
        named.write_text("index\n" + "\n".join(map(str, range(24))))
        override = f"data.subset={named}"
    with pytest.raises(ValueError, match=message):
        foretell(tmp_path, folder_of_shapes, *RUN, "max_samples=12", override)
