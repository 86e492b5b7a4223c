"""The observers of samples in one run, on two ranks with uneven shares, tracked: each sample exactly once."""

import json

import pandas as pd

from tiny import tiny_overrides
from wandb_offline import read_run

CALLBACKS = "callbacks=[sample_information,learning_speed,training_time]"


def test_all_observers_of_samples_share_a_run_on_two_ranks(console, tmp_path, folder_of_shapes):
    options = [
        *tiny_overrides(folder_of_shapes), CALLBACKS, "callbacks.sample_information.top=4",
        "callbacks.learning_speed.top=4",
        "method=finetune", "method.batch_norm=frozen", "data.batch_size=10", "data.label_noise=0.2", "logger=[wandb]",
        "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=3", "test=false",
        "hydra.run.dir=run",
    ]  # fmt: skip
    console("lqf-train", *options)
    run = tmp_path / "run"
    manifest = pd.read_parquet(run / "manifest.parquet")
    used = manifest.loc[(manifest["split"] == "train") & manifest["used"], "index"].tolist()
    information = pd.read_parquet(run / "sample_information.parquet")
    speed = pd.read_parquet(run / "learning_speed.parquet")
    assert information["index"].tolist() == speed["index"].tolist() == used
    assert (speed["epochs"] == 3).all()  # an epoch of 24 samples in batches of 10 repeats some of them under DDP
    assert information["local_influence"].notna().all()
    report = json.loads((run / "training_time.json").read_text())
    assert report["steps"] == 9

    (file,) = tmp_path.rglob("run-*.wandb")
    tracked = read_run(file)
    ends = [tracked.table(f"sample_information/{end}_informative")[0]["data"] for end in ("most", "least")]
    shown = [row[1] for rows in ends for row in rows]
    assert len(shown) == len(set(shown)) == 8
    assert set(shown) <= set(used)
    ordered = information.sort_values("function_information", ascending=False, kind="stable")["index"].tolist()
    assert [row[1] for row in ends[0]] == ordered[:4]
    by_class, _ = tracked.table("sample_information/by_class")
    assert sum(row[1] for row in by_class["data"]) == len(used)
    hardest, _ = tracked.table("train/learning_speed_hardest")
    assert len({row[1] for row in hardest["data"]}) == 4
    assert len(tracked.series("train/predicted_loss")) >= 1
    assert tracked.picture("pictures/sample_information").stat().st_size > 1000
