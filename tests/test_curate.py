import json

import numpy as np
import pandas as pd
import pytest

from lqf_lightning.curate import curate
from tiny import compose, run_tiny, write_shapes

PROBE = [
    "method=lqf_sgd", "method.solver=kernel", "method.layers=[head]", "method.ridge=0.1", "callbacks=[]",
    "trainer.precision=64-true", "test=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder_of_shapes):
    """A linear probe on five of eight images per class."""
    folder = tmp_path_factory.mktemp("probe")
    run_tiny(folder, folder_of_shapes, "data.shots=5", *PROBE)
    return folder


def curated(run, output, task, *overrides, world=1):
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world}", "trainer.strategy=ddp_fork"]
    config = compose(
        f"checkpoint={run}/checkpoints/last.ckpt", f"paths.output_dir={output}", f"task={task}", "progress=none",
        *(ranks if world > 1 else []), "trainer.precision=64-true", *overrides, name="curate",
    )  # fmt: skip
    curate(config)
    return json.loads((output / "curation.json").read_text())


def retrain(tmp_path, root, *overrides):
    metrics = run_tiny(tmp_path / "again", root, *PROBE, *overrides)
    return pd.read_parquet(tmp_path / "again" / "manifest.parquet"), metrics


def test_a_summary_is_a_subset_that_a_run_takes_as_it_is(run, tmp_path, folder_of_shapes):
    report = curated(run, tmp_path / "out", "summarize", "summarize.keep=0.4", "summarize.step=0.2")
    subset = pd.read_parquet(tmp_path / "out" / "subset.parquet")
    assert report["kept"] == len(subset) == 6
    assert set(report["accuracy"]) == {"iterative", "random"}
    assert sum(report["kept_by_class"].values()) == 6
    ridge = report["method_ridge_of_same_penalty"]
    manifest, metrics = retrain(
        tmp_path, folder_of_shapes, f"data.subset={tmp_path}/out/subset.parquet", f"method.ridge={ridge}"
    )
    used = manifest[manifest["used"] & (manifest["split"] == "train")]
    assert used["index"].tolist() == subset["index"].tolist()
    assert metrics["val/acc"] == pytest.approx(report["accuracy"]["iterative"], abs=1e-6)
    assert (tmp_path / "out" / "pictures" / "curation.png").exists()


def test_weights_lower_the_loss_of_a_run_that_takes_them(run, tmp_path, folder_of_shapes):
    before = json.loads((run / "metrics.json").read_text())
    report = curated(run, tmp_path / "out", "reweight", "by=validation", "reweight.length=0.3")
    weights = pd.read_parquet(tmp_path / "out" / "weights.parquet")
    assert list(weights) == ["index", "path", "weight"]
    assert len(weights) == 15
    assert weights["weight"].min() >= 0
    assert report["steps_taken"] >= 1
    _, metrics = retrain(tmp_path, folder_of_shapes, "data.shots=5", f"data.weights={tmp_path}/out/weights.parquet")
    assert before["val/loss"] == pytest.approx(report["losses"][0], rel=1e-5)
    assert metrics["val/loss"] == pytest.approx(report["losses"][-1], rel=1e-5)
    assert metrics["val/loss"] < before["val/loss"]


def test_a_run_is_extended_by_what_it_left_out(run, tmp_path, folder_of_shapes):
    report = curated(run, tmp_path / "out", "extend", "by=validation", "extend.count=4", "extend.batch=2")
    added, subset = (pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("added", "subset"))
    core = pd.read_parquet(run / "manifest.parquet")
    core = core.loc[core["used"] & (core["split"] == "train"), "index"]
    assert (report["core"], report["pool"]) == (15, 9)
    assert 1 <= report["added"] == len(added) <= 4
    assert sorted([*core, *added["index"]]) == subset["index"].tolist()
    assert report["losses"][-1] < report["losses"][0]
    assert report["ridge"] == pytest.approx(0.1 * 15)  # that of the training set, not of the pool besides
    manifest, _ = retrain(tmp_path, folder_of_shapes, f"data.subset={tmp_path}/out/subset.parquet")
    assert manifest.loc[manifest["used"] & (manifest["split"] == "train"), "index"].tolist() == subset["index"].tolist()


def test_detrimental_samples_are_listed_and_left_out(run, tmp_path):
    report = curated(run, tmp_path / "out", "detrimental", "detrimental.share=0.2")
    table, subset = (pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("detrimental", "subset"))
    assert report["detrimental"] == len(table) == 3
    assert not set(table["index"]) & set(subset["index"])
    assert len(subset) == 12
    values = pd.read_parquet(tmp_path / "out" / "samples.parquet")["value"]
    assert np.allclose(table["value"], values.sort_values(ascending=False).head(3))


def test_the_number_of_ranks_plays_no_part(run, tmp_path):
    tables = []
    for size in (1, 3):
        curated(run, tmp_path / str(size), "reweight", "by=validation", world=size)
        tables.append(pd.read_parquet(tmp_path / str(size) / "weights.parquet"))
    for table in tables[1:]:
        assert table["index"].tolist() == tables[0]["index"].tolist()
        assert np.allclose(table["weight"], tables[0]["weight"], rtol=1e-6, atol=1e-8)


def test_a_fine_tuning_run_is_curated_by_its_expansion_at_the_start(tmp_path, folder_of_shapes):
    run_tiny(
        tmp_path / "run",
        folder_of_shapes,
        "method=finetune",
        "callbacks=[]",
        "method.layers=[head]",
        "trainer.max_epochs=1",
        "test=false",
    )
    report = curated(
        tmp_path / "run",
        tmp_path / "out",
        "summarize",
        "summarize.keep=0.5",
        "summarize.baselines=[]",
        "trainer.precision=32-true",
    )
    assert report["kept"] == 12
    assert report["exact"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=shrink"], "Set task=summarize"),
        (["task=summarize", "summarize.keep=1.5"], r"Set summarize\.keep=0\.5"),
        (["task=detrimental", "detrimental.share=0.1", "detrimental.threshold=1"], r"Set detrimental\.share=null"),
        (["task=reweight", "by=test"], "Set by="),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_loaded(overrides, message, tmp_path):
    config = compose("checkpoint=none.ckpt", f"paths.output_dir={tmp_path}", *overrides, name="curate")
    with pytest.raises(ValueError, match=message):
        curate(config)


@pytest.fixture
def folder_without_validation(tmp_path):
    write_shapes(tmp_path / "data" / "train", per_class=4, seed=0)
    write_shapes(tmp_path / "data" / "test", per_class=2, seed=1)
    return tmp_path / "data"


def test_a_run_that_left_nothing_out_has_no_pool(tmp_path, folder_of_shapes, monkeypatch):
    run_tiny(tmp_path / "run", folder_of_shapes, *PROBE)
    monkeypatch.setattr("lqf_lightning.curate.build_trainer", _not_yet)
    with pytest.raises(ValueError, match="there is no pool"):
        curated(tmp_path / "run", tmp_path / "out", "extend")


def _not_yet(*_):
    raise AssertionError("something is computed already")


@pytest.mark.filterwarnings("ignore:.*across ranks is zero", "ignore:.*could not find the monitored key")
def test_a_run_without_validation_images_is_told_so_before_anything_is_computed(
    tmp_path, folder_without_validation, monkeypatch
):
    run_tiny(tmp_path / "run", folder_without_validation, *PROBE, "data.val_fraction=0")
    monkeypatch.setattr("lqf_lightning.curate.build_trainer", _not_yet)
    with pytest.raises(ValueError, match=r"Set by=leave_one_out") as refusal:
        curated(tmp_path / "run", tmp_path / "out", "reweight", "by=validation")
    assert "+data" not in str(refusal.value)  # samples keep their split
    with pytest.raises(AssertionError, match="computed"):
        curated(tmp_path / "run", tmp_path / "out", "reweight")


def test_a_process_does_not_wait_for_the_files_of_the_first(run, tmp_path, monkeypatch):
    """As in all processes but the first, which write nothing."""
    monkeypatch.setattr("lqf_lightning.curate.write_curation", lambda *_: None)
    config = compose(
        f"checkpoint={run}/checkpoints/last.ckpt", f"paths.output_dir={tmp_path}", "task=detrimental",
        "detrimental.share=0.2", "progress=none", "trainer.precision=64-true", name="curate",
    )  # fmt: skip
    assert curate(config)["detrimental"] == 3


def test_what_no_run_would_take_is_not_written(run, tmp_path):
    with pytest.raises(ValueError, match=r"Set detrimental\.share=0\.1"):
        curated(run, tmp_path / "all", "detrimental", "detrimental.share=1.0")
    assert not list(tmp_path.rglob("subset.parquet"))
