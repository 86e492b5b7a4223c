import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lqf_lightning.compare import choose_device, compare
from lqf_lightning.comparison.inputs import checkpoints_of, open_data, open_side
from lqf_lightning.comparison.words import number
from lqf_lightning.evaluate import evaluate
from lqf_lightning.references import open_reference
from lqf_lightning.teachers import StoredPredictions
from tiny import CLASSES, compose, run_tiny

FINETUNE = ["method=finetune", "callbacks=[]", "method.optimizer.lr=0.02", "test=false", "data.batch_size=6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder_of_shapes):
    """Checkpoints of an old network, of two that go on from it, of one that is never blue, and of a linearized one."""
    root = tmp_path_factory.mktemp("compared")
    names = ("old", "new1", "new2", "broken", "lqf")
    run_tiny(root / "old", folder_of_shapes, *FINETUNE, "data.subset_ratio=0.5", "trainer.max_epochs=4")
    start = f"backbone.weights={root}/old/checkpoints/last.ckpt"
    for seed in (1, 2):
        run_tiny(root / f"new{seed}", folder_of_shapes, *FINETUNE, start, f"seed={seed}", "trainer.max_epochs=1")
    run_tiny(root / "lqf", folder_of_shapes, "method=lqf_sgd", "callbacks=[]", "test=false", "trainer.max_epochs=1")
    shutil.copytree(root / "new1", root / "broken")
    checkpoints = {name: root / name / "checkpoints" / "last.ckpt" for name in names}
    content = torch.load(checkpoints["broken"], weights_only=True)
    content["state_dict"]["model.fc.bias"] += torch.tensor([-100.0, 0.0, 0.0])
    torch.save(content, checkpoints["broken"])
    return checkpoints


def run(output, old, new, *overrides):
    options = [f"paths.output_dir={output}", f"old={old}", f"new={new}", "resamples=200", *overrides]
    return compare(compose(*options, name="compare"))


def of_folder(root):
    return ["data=folder", f"data.source.root={root}", "data.image_size=32", "data.num_workers=0"]


def stored(path, data_root, answers, classes, confidence=None):
    """Write predictions for the test images of a folder: a list of class names by position, in order of index."""
    config = compose("old=resnet18", "new=resnet18", *of_folder(data_root), name="compare")
    _, data = open_data(config)
    rows = data.manifest.rows("test")
    table = pd.DataFrame({"index": rows["index"].to_numpy(), "prediction": answers(rows["class"].tolist())})
    if confidence is not None:
        table["confidence"] = confidence
    StoredPredictions(table, classes, "hand-made").write(path)
    return path


def test_a_model_compared_with_itself_flips_nothing(runs, tmp_path):
    report = run(tmp_path, runs["new1"], runs["new1"], "shares=[0,0.5,1]")
    assert report["flips"]["counts"]["negative_flips"] == report["flips"]["counts"]["positive_flips"] == 0
    assert report["flips"]["agreement"] == 1
    assert report["flips"]["metrics"]["nfr"]["estimate"] == 0
    assert report["negative_flips"] == []
    assert "keeps" in report["verdict"]
    assert report["averages"]["chosen"] is None
    assert report["models"]["old"]["fingerprint"] == report["models"]["new"]["fingerprint"]
    assert "breaks no answer" in (tmp_path / "report.html").read_text()


def test_hand_made_predictions_give_known_rates(tmp_path, folder_of_shapes):
    # 13 test images: 5 blue, 4 green, 4 red. Old: blues are blue, all others green. New: one blue is, and all others.
    old = stored(
        tmp_path / "old.parquet", folder_of_shapes, lambda c: ["blue" if x == "blue" else "green" for x in c], CLASSES
    )
    answers = ["blue", "red", "green", "green", "green", *4 * ["green"], *4 * ["red"]]
    sure = [0.5, 0.9, 0.6, 0.8, 0.7, *8 * [0.5]]
    new = stored(tmp_path / "new.parquet", folder_of_shapes, lambda _: answers, ["red", "green", "blue"], sure)
    report = run(tmp_path / "out", old, new, *of_folder(folder_of_shapes))
    flips = report["flips"]
    assert flips["counts"] == {"both_right": 5, "negative_flips": 4, "positive_flips": 4, "both_wrong": 0}
    assert flips["metrics"]["nfr"]["estimate"] == pytest.approx(4 / 13)
    assert flips["metrics"]["nfi"]["estimate"] == 1
    assert flips["metrics"]["relative_nfr"]["estimate"] == pytest.approx(4 / 13 / (9 / 13 * 4 / 13))
    assert flips["agreement"] == pytest.approx(5 / 13)
    assert [flip["new"]["confidence"] for flip in report["negative_flips"]] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert report["negative_flips"][0]["old"] == {"prediction": "blue", "confidence": None}
    assert report["replacements"] == [
        {"class": "blue", "replaced_by": "green", "count": 3}, {"class": "blue", "replaced_by": "red", "count": 1},
    ]  # fmt: skip
    assert [(row["class"], row["negative_flips"], row["positive_flips"]) for row in flips["classes"]] == [
        ("blue", 4, 0), ("green", 0, 0), ("red", 0, 4),
    ]  # fmt: skip
    assert report["averages"]["reason"].endswith("is no checkpoint of a run, whose weights could be averaged")
    low, high = flips["metrics"]["nfr"]["low"], flips["metrics"]["nfr"]["high"]
    assert 0 < low < 4 / 13 < high < 1


def test_classes_that_only_one_model_knows_are_left_out_and_named(tmp_path, folder_of_shapes):
    old = stored(tmp_path / "old.parquet", folder_of_shapes, lambda c: ["blue"] * len(c), ["blue", "green", "gold"])
    new = stored(tmp_path / "new.parquet", folder_of_shapes, lambda c: ["red"] * len(c), CLASSES)
    report = run(tmp_path / "out", old, new, *of_folder(folder_of_shapes))
    assert report["unshared"] == {"only_old": ["gold"], "only_new": ["red"]}
    assert (report["flips"]["number"], report["flips"]["left_out"]) == (9, 4)
    assert report["flips"]["metrics"]["error_new"]["estimate"] == 1
    assert report["flips"]["error_new_all"] == pytest.approx(9 / 13)  # the reds are right
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Only the new model knows red." in page
    assert "4 images of classes" in page


def test_the_chosen_average_is_what_lqf_eval_measures(runs, tmp_path):
    report = run(tmp_path, runs["old"], runs["broken"], "max_error_increase=1", "shares=[0.5,0.999]")
    averages = report["averages"]
    assert report["flips"]["counts"]["negative_flips"] > 0  # the old network knows some blue
    assert averages["kinds"] == ["bcwi"]
    assert averages["chosen"]["share"] == 0.999
    assert averages["validation"]["number"] == 11  # the test set has 13 images
    for measured in (*averages["validation"]["points"], averages["validation"]["new"]):
        assert 11 * measured["error"] == pytest.approx(round(11 * measured["error"]))
    path = tmp_path / "average" / "checkpoints" / "average.ckpt"
    assert averages["checkpoint"] == str(path)
    options = [f"checkpoint={path}", "progress=none", "callbacks=[]", f"paths.output_dir={tmp_path}/eval"]
    evaluated = evaluate(compose(*options, name="eval"))
    assert evaluated["test/acc"] == pytest.approx(averages["result"]["metrics"]["accuracy_new"]["estimate"], abs=1e-6)
    assert open_reference(str(path)).fingerprint == averages["fingerprint"]
    again = run(tmp_path / "again", runs["old"], path, "averages=null")
    assert again["flips"] == averages["result"]
    # The average's rates less the new model's, on the same images.
    change = averages["result"]["metrics"]["nfr"]["estimate"] - report["flips"]["metrics"]["nfr"]["estimate"]
    assert averages["difference"]["nfr"]["estimate"] == pytest.approx(change)
    assert change < 0


@pytest.mark.parametrize("several", [False, True])
def test_an_average_is_written_with_the_images_it_was_measured_on(several, runs, tmp_path):
    options = ["shares=[0.5]", "max_error_increase=1", "+data.image_size=48", "+data.crop_fraction=0.5"]
    new = f"[{runs['new2']},{runs['broken']}]" if several else runs["broken"]
    averages = run(tmp_path, runs["old"], new, *options)["averages"]
    path = tmp_path / "average" / "checkpoints" / "average.ckpt"
    assert open_reference(path).view == open_reference(runs["broken"]).view
    again = run(tmp_path / "again", runs["old"], path, "averages=null")
    assert again["flips"] == averages["result"]
    assert again["models"]["new"]["fingerprint"] == averages["fingerprint"]


def test_written_predictions_stand_for_the_models(runs, tmp_path):
    first = run(tmp_path / "a", runs["old"], runs["new1"], "averages=null")
    second = run(tmp_path / "b", tmp_path / "a" / "old_predictions.parquet", runs["new1"], "averages=null")
    assert second["flips"] == first["flips"]
    assert second["negative_flips"] == first["negative_flips"]
    assert json.loads((tmp_path / "b" / "report.json").read_text()) == second


def test_several_new_models_are_an_ensemble_and_a_soup(runs, tmp_path):
    report = run(tmp_path, runs["old"], f"[{runs['new1']},{runs['new2']}]", "shares=[0,0.5]", "max_error_increase=1")
    assert report["averages"]["kinds"] == ["soup"]
    assert len(report["models"]["new"]["members"]) == 2
    logits = [StoredPredictions.read(tmp_path / "new_predictions.parquet")]
    for name in ("new1", "new2"):
        run(tmp_path / name, runs["old"], runs[name], "averages=null")
        logits.append(StoredPredictions.read(tmp_path / name / "new_predictions.parquet"))
    index = torch.tensor(logits[1].table["index"].to_numpy())
    mean = (logits[1].look_up(index) + logits[2].look_up(index)) / 2
    torch.testing.assert_close(logits[0].look_up(index), mean)


class _Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses, self.alternatives, self.tags = [], [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.alternatives += [value for name, value in attributes if name == "alt"]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(page):
    checker = _Checker()
    checker.feed(page)
    assert not checker.open
    return checker


def test_the_page_needs_nothing_else_and_says_what_the_report_does(runs, tmp_path):
    report = run(tmp_path, runs["old"], runs["broken"], "max_error_increase=1", "shares=[0,0.999,1]")
    page = (tmp_path / "report.html").read_text()
    checker = checked(page)
    assert all(address.startswith("data:image/") for address in checker.addresses)
    assert len(checker.addresses) == 1 + len(report["negative_flips"]) > 1
    assert not checker.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\(", page)
    text = " ".join(checker.text)
    for flips in (report["flips"], report["averages"]["result"]):
        for name, values in flips["metrics"].items():
            assert number(name, values["estimate"]) in text, name
    assert report["verdict"] in text
    assert report["models"]["old"]["fingerprint"] in text
    assert report["averages"]["checkpoint"] in text
    assert all(flip["path"] in text for flip in report["negative_flips"])


def write_classes(root, classes, per_class=1):
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for image in range(per_class):
                pixels = generator.integers(0, 255, (200, 300, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{image}.png")


def test_names_are_text_and_never_markup(tmp_path):
    odd = ['<b>&"', "<script>alert(1)</script>".replace("/", ""), "$x_1$", "plain"]
    write_classes(tmp_path / "images", odd)
    root = tmp_path / "images"
    old = stored(tmp_path / "old.parquet", root, lambda c: c, odd)
    new = stored(tmp_path / "new.parquet", root, lambda c: c[1:] + c[:1], odd)
    report = run(tmp_path / "out", old, new, *of_folder(root), "data.val_fraction=0")
    assert report["flips"]["counts"]["negative_flips"] == 4
    page = (tmp_path / "out" / "report.html").read_text()
    checker = checked(page)
    assert not checker.tags & {"b>&", "script"}
    assert '<b>&"' in "".join(checker.text)
    assert sorted(checker.alternatives) == sorted(odd)
    assert "&lt;script&gt;" in page


def test_many_classes_have_a_table_and_a_matrix_of_those_involved(tmp_path):
    names = [f"class {number:02d}" for number in range(43)]
    write_classes(tmp_path / "images", names)
    root = tmp_path / "images"
    old = stored(tmp_path / "old.parquet", root, lambda c: c, names)
    new = stored(tmp_path / "new.parquet", root, lambda c: c[1:] + c[:1], names[::-1])
    report = run(tmp_path / "out", old, new, *of_folder(root), "data.val_fraction=0", "gallery=3")
    assert len(report["flips"]["classes"]) == 43
    assert len(report["replacements"]) == 43
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The 20 classes most involved" in page
    assert page.count("<tr><td>class ") == 43
    assert len(checked(page).addresses) == 3


def test_images_that_a_model_was_trained_on_are_told(runs, tmp_path, folder_of_shapes):
    root = shutil.copytree(folder_of_shapes, tmp_path / "images")
    shutil.copy(root / "train" / "red" / "000.png", root / "test" / "red" / "seen.png")
    report = run(tmp_path / "out", runs["old"], runs["new1"], f"+data.source.root={root}", "averages=null")
    told = [sentence.split(" was trained")[0] for sentence in report["warnings"]]
    assert "The new model" in told
    assert "trained on 1 of the 14 test images" in report["warnings"][-1]
    assert run(tmp_path / "clean", runs["old"], runs["new1"], "averages=null")["warnings"] == []


def test_models_whose_weights_cannot_be_averaged_are_compared_all_the_same(runs, tmp_path):
    report = run(tmp_path, runs["old"], runs["lqf"])
    assert "does not answer by the weights of a network alone" in report["averages"]["reason"]
    assert report["averages"]["reason"] in "".join(checked((tmp_path / "report.html").read_text()).text)
    with pytest.raises(ValueError, match=r"averages=\['bcwi'\] are not possible: lqf/last.*Set averages=null"):
        run(tmp_path, runs["old"], runs["lqf"], "averages=[bcwi]")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["split=train"], ValueError, r"got 'train'\. Set split=test"),
        (["averages=bcwi"], ValueError, r"`averages` must be auto, null or a list.*Set averages=auto"),
        (["averages=[mean]"], ValueError, r"bcwi, fisher, soup, got \['mean'\]"),
        (["averages=[soup]"], ValueError, r"need several new models, but new names 1 model\. Set averages=\[bcwi\]"),
        (["averages=[bcwi,bcwi]"], ValueError, r"once of bcwi, fisher, soup, got \['bcwi', 'bcwi'\]\. Set averages="),
        (["shares=0.5"], ValueError, r"`shares` must be a list.*got 0\.5\. Set shares=\[0,0\.5,1\]"),
        (["shares=null"], ValueError, r"`shares` must be a list.*got None\. Set shares="),
        (["shares=[]"], ValueError, r"got \[\]\. Set shares="),
        (["shares=[0,half]"], ValueError, r"got \[0, 'half'\]\. Set shares="),
        (["shares=[true]"], ValueError, r"got \[True\]\. Set shares="),
        (["level=high"], ValueError, r"got 'high'\. Set level=0\.95"),
        (["level=null"], ValueError, r"got None\. Set level=0\.95"),
        (["resamples=99.5"], ValueError, r"a whole number, at least 1, got 99\.5\. Set resamples=2000"),
        (["gallery=null"], ValueError, r"got None\. Set gallery=24"),
        (["gallery=[3]"], ValueError, r"got \[3\]\. Set gallery=24"),
        (["seed=null"], ValueError, r"got None\. Set seed=0"),
        (["max_error_increase=little"], ValueError, r"got 'little'\. Set max_error_increase=0\.01"),
        (["fisher_samples=all"], ValueError, r"got 'all'\. Set fisher_samples=null"),
        (["batch_norm_samples=2.5"], ValueError, r"got 2\.5\. Set batch_norm_samples=null"),
        (["device=null"], ValueError, r"got None\. Set device=auto"),
        (["device=0"], ValueError, r"got 0\. Set device=auto"),
        (["new=null"], ValueError, r"`new` must be given\. Set new=RUN"),
        (["shares=[0,2]"], ValueError, r"from 0 to 1, got \[0, 2\]\. Set shares="),
        (["shares=[0.5,0.5]"], ValueError, r"different numbers"),
        (["batch_norm=off"], ValueError, r"'reestimate' or 'average', got .*Set batch_norm=reestimate"),
        (["max_error_increase=-1"], ValueError, r"Set max_error_increase=0\.01"),
        (["fisher_samples=0"], ValueError, r"Set fisher_samples=null"),
        (["batch_norm_samples=1"], ValueError, r"Set batch_norm_samples=null"),
        (["level=95"], ValueError, r"between 0 and 1, got 95\. Set level=0\.95"),
        (["resamples=0"], ValueError, r"Set resamples=2000"),
        (["gallery=-1"], ValueError, r"Set gallery=24"),
        (["old=???"], ValueError, r"`old` must be given\. Set old=RUN"),
        (["device=quantum"], ValueError, r"device=quantum cannot be used here.*Set device=auto"),
        (["new=nowhere.ckpt"], FileNotFoundError, r"new=.*nowhere\.ckpt is no file.*Set new=RUN"),
        (["old=nowhere/*.ckpt"], ValueError, r"old=.*nowhere/\*\.ckpt: no file matches .*\. Set old="),
        (["old=nowhere.parquet"], FileNotFoundError, r"old=.*nowhere\.parquet is no file.*Set old="),
        (["new=nowhere.parquet"], FileNotFoundError, r"new=.*nowhere\.parquet is no file.*Set new="),
        (["old=resnet1"], ValueError, r"old=resnet1: .*set old="),
        (["old=5"], TypeError, r"`old` must be a name.*Set old="),
        (["old={weights: null}"], ValueError, r"Set old\.name=resnet50"),
    ],
)
def test_wrong_options_are_refused_before_any_work(overrides, error, message, runs, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path / "out", runs["old"], runs["new1"], *overrides)
    assert not (tmp_path / "out").exists()


def test_a_run_folder_is_no_model_but_its_checkpoints_are_told(runs, tmp_path):
    folder = runs["new1"].parent.parent
    for role in ("old", "new"):
        sides = {"old": runs["old"], "new": runs["new1"]} | {role: folder}
        with pytest.raises(FileNotFoundError, match=rf"{role}={folder} is no file.*last\.ckpt.*Set {role}=RUN"):
            run(tmp_path / "out", *sides.values())


def test_unusable_predictions_are_told_by_the_option_that_names_them(runs, tmp_path, folder_of_shapes):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"^old=.*damaged\.parquet is no Parquet file.*Set old to one"):
        run(tmp_path / "out", damaged, runs["new1"])
    whole = StoredPredictions.read(stored(tmp_path / "a.parquet", folder_of_shapes, lambda c: c, CLASSES))
    StoredPredictions(whole.table.iloc[1:], CLASSES, "part").write(tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=r"^new=.*no prediction for 1 of 13 test samples.*Set new to a file"):
        run(tmp_path / "out", runs["old"], tmp_path / "part.parquet", *of_folder(folder_of_shapes))
    assert not (tmp_path / "out").exists()


def test_paths_with_brackets_are_paths(runs, tmp_path):
    folder = shutil.copytree(runs["new1"].parent.parent, tmp_path / "run [1]")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    config = compose("old=resnet18", "new=resnet18", name="compare")
    config.old = config.new = str(checkpoint)
    assert checkpoints_of([config.old, str(tmp_path / "*" / "checkpoints" / "*.ckpt")], "old").count(checkpoint) == 2
    assert open_side(config, "new", CLASSES).checkpoints == [checkpoint]


def test_data_are_asked_for_where_no_run_gives_them(tmp_path, folder_of_shapes):
    path = stored(tmp_path / "a.parquet", folder_of_shapes, lambda c: c, CLASSES)
    with pytest.raises(ValueError, match=r"no checkpoint in a run folder.*Set data=folder data\.source\.root=PATH"):
        run(tmp_path / "out", path, path)


def test_a_split_without_samples_is_refused(runs, tmp_path, folder_of_shapes):
    root = shutil.copytree(folder_of_shapes, tmp_path / "images")
    shutil.rmtree(root / "val")
    options = [f"+data.source.root={root}", "+data.val_fraction=0"]
    with pytest.raises(ValueError, match=r"no val samples\. Set split=test"):
        run(tmp_path / "out", runs["old"], runs["new1"], *options, "split=val")
    report = run(tmp_path / "out", runs["old"], runs["new1"], *options)
    assert report["averages"]["reason"] == "there are no validation images to choose by"


def test_models_without_a_common_class_are_refused(tmp_path, folder_of_shapes):
    old = stored(tmp_path / "old.parquet", folder_of_shapes, lambda c: ["cat"] * len(c), ["cat"])
    new = stored(tmp_path / "new.parquet", folder_of_shapes, lambda c: c, CLASSES)
    with pytest.raises(ValueError, match=r"\['cat'\].*\['blue', 'green', 'red'\].*Set old, new or data"):
        run(tmp_path / "out", old, new, *of_folder(folder_of_shapes))


def test_the_device_is_found():
    assert choose_device("auto").type in ("cpu", "cuda")
    assert choose_device("cpu") == torch.device("cpu")


def test_wandb_gets_the_numbers_and_the_page(runs, tmp_path, wandb_runs):
    import wandb

    report = run(tmp_path / "out", runs["old"], runs["new1"], "averages=null", "logger=[wandb,csv]")
    wandb.finish()
    (read,) = wandb_runs()
    (nfr,) = read.series("test/nfr")
    assert nfr == pytest.approx(report["flips"]["metrics"]["nfr"]["estimate"])
    assert str(runs["old"]) in json.dumps(read.config)
    assert "test/nfr" in (tmp_path / "out" / "csv" / "metrics.csv").read_text()
    (page,) = read.series("report/path")
    assert (read.folder / "files" / page).read_text() == (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_command_prints_the_rates_and_where_the_report_is(runs, console, tmp_path):
    done = console("lqf-compare", f"old={runs['old']}", f"new={runs['new1']}", "averages=null", "hydra.run.dir=out")
    assert "negative flip rate (NFR)" in done.stdout
    assert "out/report.html" in done.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert metrics["test/nfr"] == report["flips"]["metrics"]["nfr"]["estimate"]
