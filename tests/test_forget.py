"""Requests to forget, answered for real by the command's own function on tiny runs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import wandb

from lqf_lightning.data import Manifest
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.deletion import complete
from lqf_lightning.deletion.certificate import verify_certificate
from lqf_lightning.deletion.journal import Journal
from lqf_lightning.deletion.remains import remains
from lqf_lightning.evaluate import evaluate
from lqf_lightning.forget import _refuse_changes, forget
from tiny import compose, run_tiny, write_shapes

COHORT = [2, 5, 21]
LQF = ("method=lqf_cg", "method.ridge=0.1", "method.tolerance=1e-6", "trainer.max_epochs=80")
QUIET = ("progress=none",)
RANKS = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork", "trainer.devices=2")
FAST = ("callbacks.scrub.relearn=false", "callbacks.scrub.shadows=0", "callbacks.scrub.queries=4")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("forget") / "shapes"
    write_shapes(root / "train", per_class=9, seed=0, extra=2)
    write_shapes(root / "test", per_class=4, seed=1)
    return root


@pytest.fixture(scope="module")
def finished(shapes):
    run_tiny(shapes.parent / "run", shapes, *LQF, "callbacks=[learning_speed,sample_information]", "test=false")
    return shapes.parent / "run"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def ask(run, folder, *overrides, fast=True):
    options = [*QUIET, *(FAST if fast else ()), *overrides]
    checkpoint = f"checkpoint={run / 'checkpoints' / 'last.ckpt'}"
    return forget(compose(checkpoint, f"paths.output_dir={folder}", *options, name="forget"))


def weights(folder):
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([w.flatten().double() for name, w in state.items() if name.startswith("linearized.dw.")])


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def retrained(shapes, folder, cohort, run):
    used = Manifest.read(run / "manifest.parquet").rows("train")["index"]
    kept = used[~used.isin(cohort)]
    pd.DataFrame({"index": kept}).to_csv(folder / "kept.csv", index=False)
    run_tiny(folder / "retrained", shapes, *LQF, "callbacks=[]", "test=false", f"data.subset={folder / 'kept.csv'}")
    return weights(folder / "retrained")


@pytest.mark.parametrize("solver", ["newton", "kernel"])
def test_new_model_is_the_one_trained_without_the_samples(run, shapes, tmp_path, solver):
    expected, before = retrained(shapes, tmp_path, COHORT, run), weights(run)
    options = [f"callbacks.scrub.name={solver}", "callbacks.scrub.noise=none", "callbacks.scrub.tolerance=1e-6"]
    ask(run, tmp_path / "new", f"cohort={COHORT}", *options)
    found, change = weights(tmp_path / "new"), float((before - expected).norm())
    assert float((found - expected).norm()) < 1e-3 * change  # both are known to 1e-6 of the first gradient
    bound = report_of(tmp_path / "new")["scrub"]["distance_bound"]
    assert float((found - expected).norm()) < bound + 1e-4 * float(expected.norm())


def test_report_certificate_and_new_run_belong_together(run, tmp_path):
    ask(run, tmp_path / "new", f"cohort={COHORT}", fast=False)
    report = report_of(tmp_path / "new")
    assert report["judgement"]["passed"], report["judgement"]
    assert report["request"]["number"] == 3
    assert report["request"]["train_after"] == report["request"]["train_before"] - 3
    assert verify_certificate(tmp_path / "new") == []
    models = report["read_outs"]["models"]
    assert set(models) == {"original", "scrubbed", "retrained"}
    assert models["retrained"]["tug_of_war"] == 1
    assert models["original"]["relearn_steps"] == 0
    assert report["bound"]["nats"] + report["bound"]["intercept_nats"] < 1
    whole, told = report["bound"]["measured_nats"], [entry["nats"] for entry in report["bound"]["queries"]]
    assert told == sorted(told)
    assert told[-1] <= whole * (1 + 1e-6)
    assert (
        "prov" in (tmp_path / "new" / "report.html").read_text()
        or "nats" in (tmp_path / "new" / "report.html").read_text()
    )
    checkpoint = tmp_path / "new" / "checkpoints" / "last.ckpt"
    metrics = evaluate(
        compose(f"checkpoint={checkpoint}", f"paths.output_dir={tmp_path / 'eval'}", *QUIET, name="eval")
    )
    assert metrics["test/acc"] == pytest.approx(1 - models["scrubbed"]["test_error"])


def test_nothing_of_the_samples_is_left_in_either_folder(run, tmp_path):
    table = Manifest.read(run / "manifest.parquet").table
    paths = table.loc[COHORT, "path"].tolist()
    assert set(COHORT) < set(pd.read_parquet(run / "sample_information.parquet")["index"])
    ask(run, tmp_path / "new", f"cohort={COHORT}")
    for folder in (run, tmp_path / "new"):
        for file in (file for file in folder.rglob("*") if file.is_file()):
            assert not any(path.encode() in file.read_bytes() for path in paths), file
            if file.suffix == ".parquet" and file.name != "manifest.parquet":
                assert not set(COHORT) & set(pd.read_parquet(file)["index"])
        assert not set(paths) & set(Manifest.read(folder / "manifest.parquet").table["path"])
    assert not list(run.rglob("*.ckpt"))
    assert not (run / "sample_information.parquet").exists()
    assert json.loads((tmp_path / "new" / "removed.json").read_text())["remains"] == []
    assert Journal.read(tmp_path / "new").state == "purged"


def test_second_request_after_the_first_files_are_gone_equals_one_joint_request(run, shapes, tmp_path):
    images = Path(shutil.copytree(shapes, tmp_path / "images"))
    joint = Path(shutil.copytree(run, tmp_path / "joint"))
    exact = ["callbacks.scrub.noise=none", "callbacks.scrub.name=kernel", f"+data.source.root={images}"]
    ask(run, tmp_path / "first", f"cohort={COHORT}", *exact)
    table = Manifest.read(joint / "manifest.parquet").table
    for path in table.loc[COHORT, "path"]:
        (images / path).unlink()
    ask(tmp_path / "first", tmp_path / "second", "cohort=[6]", *exact)
    # All files of the joint request's first samples are gone before it is made.
    ask(joint, tmp_path / "once", f"cohort={[*COHORT, 6]}", *exact)
    first, second = weights(tmp_path / "second"), weights(tmp_path / "once")
    assert float((first - second).norm()) < 1e-5 * float(second.norm())
    assert [entry["number"] for entry in Journal.read(tmp_path / "second").requests] == [3, 1]
    assert report_of(tmp_path / "once")["request"]["files_gone"] == 3


def test_two_ranks_find_the_weights_of_one(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    options = ["callbacks.scrub.noise_seed=3", "callbacks.scrub.name=newton", "callbacks.scrub.tolerance=1e-6"]
    ask(run, tmp_path / "one", "cohort={class: red}", *options)
    ask(other, tmp_path / "two", "cohort={class: red}", *options, *RANKS)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert float((one - two).norm()) < 1e-4 * float(one.norm())


@pytest.mark.parametrize(
    ("cohort", "words"),
    [
        ("[9999]", "9999"),
        ("[]", "cohort"),
        ("all", "nothing would be left"),
        ("{class: purple}", "purple"),
        ("{fraction: 2}", "fraction"),
        ("missing.csv", "missing.csv"),
    ],
)
def test_bad_cohort_is_refused_and_nothing_is_touched(run, tmp_path, cohort, words):
    before = weights(run)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        ask(run, tmp_path / "new", f"cohort={cohort}")
    assert torch.equal(weights(run), before)
    assert not (tmp_path / "new" / "forgetting.json").exists()


def test_run_without_recorded_training_set_is_refused(run, tmp_path):
    (run / "manifest.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="no recorded training set"):
        ask(run, tmp_path / "new", "cohort=[2]")


def test_data_that_changed_otherwise_is_refused(run, shapes, tmp_path):
    images = Path(shutil.copytree(shapes, tmp_path / "images"))
    table = Manifest.read(run / "manifest.parquet").table
    (images / table.loc[4, "path"]).unlink()
    with pytest.raises(ValueError, match="gone without a request"):
        ask(run, tmp_path / "new", "cohort=[2]", f"+data.source.root={images}")
    shutil.copy(images / table.loc[7, "path"], images / table.loc[4, "path"])
    with pytest.raises(ValueError, match="are not what they were"):
        ask(run, tmp_path / "newer", "cohort=[2]", f"+data.source.root={images}")


def test_interrupted_deletion_leaves_two_models_apart_and_is_finished_later(run, tmp_path, monkeypatch):
    old = weights(run)

    def fail(folder, record):
        raise OSError("no more")

    monkeypatch.setattr(complete, "finish_request", fail)
    with pytest.raises(OSError, match="no more"):
        ask(run, tmp_path / "new", f"cohort={COHORT}")
    assert Journal.read(tmp_path / "new").state == "scrubbed"
    assert torch.equal(weights(run), old)
    assert not torch.equal(weights(tmp_path / "new"), old)
    assert verify_certificate(tmp_path / "new") == []
    monkeypatch.undo()
    forget(compose(f"finish={tmp_path / 'new'}", f"paths.output_dir={tmp_path / 'unused'}", name="forget"))
    assert Journal.read(tmp_path / "new").state == "purged"
    assert not list(run.rglob("*.ckpt"))


def test_finished_deletion_is_written_down(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(complete, "finish", lambda folder: None)  # as after a kill
        ask(run, tmp_path / "new", f"cohort={COHORT}")
    assert "Nothing was deleted" in (tmp_path / "new" / "report.html").read_text()
    forget(compose(f"finish={tmp_path / 'new'}", f"paths.output_dir={tmp_path / 'unused'}", name="forget"))
    removed = json.loads((tmp_path / "new" / "removed.json").read_text())
    assert "checkpoints" in removed["deleted"]
    assert removed["remains"] == []
    assert "Nothing was deleted" not in (tmp_path / "new" / "report.html").read_text()
    assert verify_certificate(tmp_path / "new") == []


def test_killed_scrub_leaves_a_folder_that_names_no_sample(run, tmp_path, monkeypatch):
    paths = Manifest.read(run / "manifest.parquet").table.loc[COHORT, "path"].tolist()
    monkeypatch.setattr("sys.argv", ["lqf-forget", f"cohort=[{','.join(paths)}]"])
    monkeypatch.setattr(complete.Request, "complete", lambda self, answered, journal, purge: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(run, tmp_path / "new", f"cohort=[{','.join(paths)}]")
    assert Journal.read(tmp_path / "new").state == "scrubbing"
    assert remains(tmp_path / "new", COHORT, paths) == []


@pytest.mark.parametrize("target", ["run", "other"])
def test_folder_of_another_run_is_not_written_to(run, tmp_path, target):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"Set hydra\.run\.dir"):
        ask(run, {"run": run, "other": other}[target], f"cohort={COHORT}")
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_half_of_the_samples_is_not_all_of_them(run, shapes, tmp_path):
    images = Path(shutil.copytree(shapes, tmp_path / "images"))
    rows = Manifest.read(run / "manifest.parquet").rows("train")
    half = rows.iloc[::2]
    assert 2 * len(half) == len(rows)  # with their files gone, as many are left as are forgotten
    for path in half["path"]:
        (images / path).unlink()
    ask(run, tmp_path / "new", f"cohort={half['index'].tolist()}", f"+data.source.root={images}")
    assert report_of(tmp_path / "new")["request"]["train_after"] == len(half)
    assert bool(weights(tmp_path / "new").any())


def test_run_without_images_to_judge_by_is_refused(run, tmp_path):
    manifest = Manifest.read(run / "manifest.parquet")
    manifest.table = manifest.table[manifest.table["split"] == "train"]
    bare = SimpleNamespace(manifest=manifest)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "manifest.parquet").touch()
    with pytest.raises(ValueError, match="neither validation nor test images"):
        _refuse_changes(tmp_path / "new", manifest, bare, Cohort(torch.tensor([2]), "one"))
    assert not list((tmp_path / "new").rglob("*"))


def test_weights_and_biases_hears_nothing_of_the_samples(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "auto")
    monkeypatch.setenv("WANDB_X_DISABLE_META", "false")
    paths = Manifest.read(run / "manifest.parquet").table.loc[COHORT, "path"].tolist()
    monkeypatch.setattr("sys.argv", ["lqf-forget", f"cohort=[{','.join(paths)}]"])
    ask(run, tmp_path / "new", f"cohort=[{','.join(paths)}]", "logger=wandb")
    wandb.finish()
    assert list((tmp_path / "new").rglob("*.wandb"))
    assert remains(tmp_path / "new", COHORT, paths) == []


def test_trial_leaves_the_old_run_alone(run, tmp_path):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    ask(run, tmp_path / "new", f"cohort={COHORT}", "purge=false")
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_wrongly_normalized_scrub_is_not_to_be_released(run, tmp_path, monkeypatch):
    from lqf_lightning.analysis import answer_request

    right = answer_request.scrub_linear

    def wrong(method, **options):
        found = right(method, **options)
        present = {name: weight.detach() for name, weight in method.trained().items()}
        # The Hessian of the sum with the gradient of the mean: short by the number of samples.
        short = {name: present[name] + (weight - present[name]) / 26 for name, weight in found.weights.items()}
        return type(found)(**{**vars(found), "weights": short})

    monkeypatch.setattr(answer_request, "scrub_linear", wrong)
    ask(run, tmp_path / "new", f"cohort={COHORT}", "callbacks.scrub.retrain=false")
    assert (run / "checkpoints" / "last.ckpt").is_file()  # the only model that is of any use
    assert Journal.read(tmp_path / "new").state == "scrubbed"
    judgement = report_of(tmp_path / "new")["judgement"]
    assert not judgement["passed"]
    assert "wrong normalization" in judgement["failures"][0]
    assert "Do not release" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.parametrize("noise", ["diagonal", "kfac"])
def test_shaped_noise_has_the_size_that_was_asked_for(run, tmp_path, noise):
    options = [f"callbacks.scrub.noise={noise}", "callbacks.scrub.sigma=0.01", "callbacks.scrub.noise_seed=1"]
    other = Path(shutil.copytree(run, tmp_path / "other"))
    ask(run, tmp_path / "noisy", f"cohort={COHORT}", *options)
    ask(other, tmp_path / "plain", f"cohort={COHORT}", "callbacks.scrub.noise=none")
    added = weights(tmp_path / "noisy") - weights(tmp_path / "plain")
    assert float(added.square().mean().sqrt()) == pytest.approx(0.01, rel=0.05)
    assert report_of(tmp_path / "noisy")["bound"]["nats"] is not None


def test_network_is_scrubbed_without_a_proof(shapes, tmp_path):
    run_tiny(tmp_path / "run", shapes, "method=finetune", "callbacks=[]", "test=false")
    ask(tmp_path / "run", tmp_path / "new", "cohort={class: red}", "callbacks.scrub.name=hide_class")
    report = report_of(tmp_path / "new")
    assert report["bound"]["nats"] is None
    assert "heuristic" in report["judgement"]["verdict"]
    assert report["read_outs"]["models"]["scrubbed"]["forget_error"] == 1
    with pytest.raises(ValueError, match="no scrub of Finetune"):
        ask(tmp_path / "new", tmp_path / "newer", "cohort=[2]", "callbacks.scrub.name=newton")


def test_mixed_privacy_forgets_everything_to_the_core(shapes, tmp_path):
    options = ["method=mixed_privacy", "trainer.max_epochs=5", "callbacks=[]", "test=false"]
    run_tiny(tmp_path / "run", shapes, *options, "data.core={fraction: 0.3}", "data.part=user")
    ask(tmp_path / "run", tmp_path / "new", "cohort=all")
    assert not bool(weights(tmp_path / "new").any())
    report = report_of(tmp_path / "new")
    assert report["bound"]["nats"] == 0
    assert report["request"]["train_after"] == 0
    assert "nothing that was learned from the" in report["judgement"]["verdict"]
    page = (tmp_path / "new" / "report.html").read_text()
    assert "infinite" not in page
    assert "the same whatever the samples were" in page
    checkpoint = tmp_path / "new" / "checkpoints" / "last.ckpt"
    evaluate(compose(f"checkpoint={checkpoint}", f"paths.output_dir={tmp_path / 'eval'}", *QUIET, name="eval"))


def test_core_data_cannot_be_forgotten(shapes, tmp_path):
    options = ["method=mixed_privacy", "trainer.max_epochs=2", "callbacks=[]", "test=false"]
    run_tiny(tmp_path / "run", shapes, *options, "data.core={fraction: 0.3}", "data.part=user")
    table = Manifest.read(tmp_path / "run" / "manifest.parquet").table
    core = int(table.loc[table["core"] != "", "index"].iloc[0])
    with pytest.raises(ValueError, match="core"):
        ask(tmp_path / "run", tmp_path / "new", f"cohort=[{core}]")


def test_cohort_may_be_an_artifact(run, tmp_path, monkeypatch):

    class Artifact:
        def download(self, root):
            pd.DataFrame({"index": COHORT}).to_csv(Path(root) / "request.csv", index=False)

    class Api:
        def artifact(self, name):
            if name != "team/project/request:v0":
                raise wandb.errors.CommError("no such artifact")
            return Artifact()

    monkeypatch.setattr(wandb, "Api", Api)
    with pytest.raises(ValueError, match=r"could not be fetched.*cohort=request\.csv"):
        ask(run, tmp_path / "none", "cohort={artifact: 'team/project/other:v0'}")
    ask(run, tmp_path / "new", "cohort={artifact: 'team/project/request:v0'}")
    assert report_of(tmp_path / "new")["request"]["number"] == 3
