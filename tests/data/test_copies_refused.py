import pandas as pd
import pytest

from lqf_lightning.curate import curate
from lqf_lightning.forget import forget
from lqf_lightning.score import score
from lqf_lightning.teachers import StoredPredictions
from tiny import compose, run_tiny

RUN = ("method=lqf_cg", "method.solver=kernel", "method.ridge=0.3", "trainer.precision=64-true", "test=false",
       "data/augmentation=crop_flip", "data.shots=2", "data.copies=2")  # fmt: skip
CALLBACKS = {
    "sample_information": [], "learning_speed": [], "memorization": ["data.shots=null", "data.subset_ratio=0.7"],
    "forgetting_bounds": [], "scrub": ["callbacks.scrub.cohort=[0]"],
}  # fmt: skip


@pytest.fixture
def no_image(monkeypatch):
    monkeypatch.setattr("lqf_lightning.data.dataset.ImageDataset.__getitem__", lambda *_: pytest.fail("a batch"))


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.usefixtures("no_image")
def test_reports_per_sample_are_refused_before_the_first_batch(name, tmp_path, folder_of_shapes):
    with pytest.raises(ValueError, match=r"one sample per training image, but data\.copies=2 .*Set data\.copies=1"):
        run_tiny(tmp_path, folder_of_shapes, *RUN, f"callbacks=[{name}]", *CALLBACKS[name])


@pytest.mark.usefixtures("no_image")
def test_stored_predictions_are_refused(tmp_path, folder_of_shapes):
    table = pd.DataFrame({"index": [0], "prediction": ["red"], "logits": [[0.0, 1.0, 2.0]]})
    StoredPredictions(table, ["blue", "green", "red"], "old").write(tmp_path / "old.parquet")
    with pytest.raises(ValueError, match=r"data\.copies=2"):
        run_tiny(tmp_path, folder_of_shapes, *RUN, "callbacks=[]", f"method.reference={tmp_path}/old.parquet")


def test_commands_on_single_images_are_refused(tmp_path, folder_of_shapes):
    run_tiny(tmp_path / "run", folder_of_shapes, *RUN, "callbacks=[]")
    kept = f"checkpoint={tmp_path}/run/checkpoints/last.ckpt"
    cohort = ["cohort={fraction: 0.2, seed: 0}", "purge=false"]
    commands = {"score": (score, []), "curate": (curate, ["task=detrimental"]), "forget": (forget, cohort)}
    for name, (command, options) in commands.items():
        config = compose(kept, *options, "progress=none", f"paths.output_dir={tmp_path}/{name}", name=name)
        with pytest.raises(ValueError, match=r"single images are made for .*data\.copies=2"):
            command(config)
