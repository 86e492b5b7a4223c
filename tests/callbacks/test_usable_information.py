import json

import pandas as pd
import pytest
import torch
from lqf_lightning.callbacks.usable_information import UsableInformation
from lqf_lightning.callbacks.usable_information_picture import draw_usable_information
from lqf_lightning.callbacks.variables import Variables

from lqf_lightning.backbones.group_features import group_features
from lqf_lightning.information.usable_information import draw_parts, usable_information
from lqf_lightning.linear import current_reducer
from lqf_lightning.methods import LQF, Finetune
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from ranks import run_on_ranks
from tiny import run_tiny

FIGURES = ["bits", "low", "high", "control", "entropy"]
GROUPS = ["stem", "stage1", "head"]


def split(number, seed):
    images, target = draw(number, seed)
    return images + 1.0 * (target - 1).view(-1, 1, 1, 1), target


TRAIN, VAL = split(45, 1), split(31, 2)


def data(**others):
    return TensorData(*TRAIN, batch_size=9, **{"val": VAL, **others})


def tuned(**options):
    return Finetune(build_backbone(), CLASSES, optimizer=SGD, **options)


def train(method, *callbacks, epochs=2, samples=None, folder=None):
    trainer = build_trainer(epochs, *callbacks, limit_val_batches=1.0, default_root_dir=folder)
    fit_on(trainer, method, samples or data())
    return trainer


def expected(method, report_on, decoder="linear"):
    """What the network says by now, all samples at once."""
    method.eval()
    train_rows = group_features(method.backbone, TRAIN[0])
    if report_on == "train":
        rows, label, parts = train_rows, TRAIN[1], draw_parts(45)
    else:
        val_rows = group_features(method.backbone, VAL[0])
        rows = {name: torch.cat([train_rows[name], val_rows[name]]) for name in GROUPS}
        label, order = torch.cat([TRAIN[1], VAL[1]]), torch.randperm(31, generator=torch.Generator().manual_seed(0))
        parts = torch.arange(45), order[:15].sort().values + 45, order[15:].sort().values + 45
    options = {"decoder": decoder, "classes": 3}
    results = {name: usable_information(rows[name].detach().float(), label, parts, **options) for name in GROUPS}
    return {name: [getattr(result, figure) for figure in FIGURES] for name, result in results.items()}


@pytest.mark.parametrize(("report_on", "decoder"), [("val", "linear"), ("train", "mlp")])
def test_every_layer_group_is_read_out(tmp_path, report_on, decoder):
    method = tuned()
    callback = UsableInformation(report_on, decoders=[decoder])
    trainer = train(method, callback, epochs=1, folder=tmp_path)
    wanted = expected(method, report_on, decoder)
    assert wanted["stage1"][0] > 0.2  # there is something to be found
    table = pd.read_parquet(tmp_path / "usable_information.parquet")
    assert list(table.columns) == ["epoch", "group", "variable", "decoder", *FIGURES]
    assert table["epoch"].tolist() == [0, 0, 0, 1, 1, 1]
    last = table[table["epoch"] == 1].set_index("group")
    for group in GROUPS:
        assert last.loc[group, FIGURES].tolist() == pytest.approx(wanted[group], abs=1e-5)
        assert trainer.callback_metrics[f"val/usable_bits/{group}"].item() == pytest.approx(wanted[group][0], abs=1e-5)
    assert (tmp_path / "pictures" / "usable_information.png").exists()


def test_the_row_of_epoch_0_is_the_network_before_training(tmp_path):
    callback, untouched = UsableInformation(), tuned()
    wanted = expected(untouched, "val")
    train(tuned(), callback, epochs=1, folder=tmp_path)
    found = {row["group"]: row["bits"] for row in callback.rows if row["epoch"] == 0}
    assert found == pytest.approx({group: wanted[group][0] for group in GROUPS}, abs=1e-5)
    assert found != pytest.approx({row["group"]: row["bits"] for row in callback.rows if row["epoch"] == 1}, abs=1e-3)


def test_training_does_not_notice(tmp_path):
    """The network has dropout and batch statistics."""
    states = []
    for callbacks in ([], [UsableInformation(max_samples=20)]):
        method = tuned()
        torch.manual_seed(4)
        train(method, *callbacks, folder=tmp_path)
        states.append(method.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_reports_come_every_so_many_epochs_and_at_the_end(tmp_path):
    callback = UsableInformation(groups=["head"], every_n_epochs=2)
    train(tuned(), callback, epochs=5, folder=tmp_path)
    assert [(row["epoch"], row["group"]) for row in callback.rows] == [(epoch, "head") for epoch in (0, 2, 4, 5)]


@pytest.mark.filterwarnings("ignore:.*across ranks is zero")
def test_a_run_without_validation_reports_every_epoch(tmp_path):
    callback = UsableInformation("train", groups=["head"])
    trainer = train(tuned(), callback, samples=data(val=None), folder=tmp_path)
    assert [row["epoch"] for row in callback.rows] == [0, 1, 2]
    assert trainer.callback_metrics["val/usable_bits/head"].item() == pytest.approx(callback.rows[-1]["bits"])


def test_the_last_epoch_is_reported_whatever_ends_the_training(tmp_path):
    callback = UsableInformation(groups=["head"], every_n_epochs=5)
    trainer = build_trainer(9, callback, limit_val_batches=1.0, default_root_dir=tmp_path, max_steps=7)
    fit_on(trainer, tuned(), data())  # five steps per epoch
    assert [row["epoch"] for row in callback.rows] == [0, 2]


def test_a_run_that_is_resumed_without_a_table_does_not_call_it_the_beginning(tmp_path):
    callback, method = UsableInformation(groups=["head"]), tuned()
    trainer = train(method, folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = build_trainer(3, callback, limit_val_batches=1.0, default_root_dir=tmp_path)
    fit_on(again, tuned(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert [row["epoch"] for row in callback.rows] == [2, 3]


def test_a_resumed_run_goes_on_with_its_table(tmp_path):
    callback, resumed = UsableInformation(groups=["head"]), UsableInformation(groups=["head"])
    train(tuned(), callback, epochs=1, folder=tmp_path)
    resumed.load_state_dict(callback.state_dict())
    train(tuned(), resumed, epochs=2, folder=tmp_path)
    assert [row["epoch"] for row in resumed.rows] == [0, 1, 2]


def test_a_separate_validation_reports_numbers_only(tmp_path):
    method, callback = tuned(), UsableInformation()
    trainer = build_trainer(1, callback, limit_val_batches=1.0, default_root_dir=tmp_path)
    (found,) = trainer.validate(method, datamodule=data(), verbose=False)
    wanted = expected(method, "val")
    assert {name: found[f"val/usable_bits/{name}"] for name in GROUPS} == pytest.approx(
        {name: wanted[name][0] for name in GROUPS}, abs=1e-5
    )
    assert not list(tmp_path.glob("*.parquet"))


class Shared(TensorData):
    """Every rank has its share of the samples; shares are uneven."""

    def _load(self, split, times=1):
        reducer, loader = current_reducer(), super()._load(split, times)
        last = reducer.world_size - 1
        owners = (0, min(1, last), 0)
        shares = [[p for p in rows if owners[p % 3] == reducer.rank] for rows in loader.batch_sampler.batches]
        loader.batch_sampler.batches = [rows for rows in shares if rows]  # the third rank has nothing
        return loader


@pytest.mark.parametrize("max_samples", [2000, 16])
def test_ranks_with_uneven_shares_find_the_same(tmp_path, max_samples):
    def look():
        trainer = build_trainer(1, default_root_dir=tmp_path)
        trainer.datamodule, method = Shared(*TRAIN, batch_size=9, val=VAL), tuned()
        method.trainer = trainer
        rows = UsableInformation(max_samples=max_samples)._report(trainer, method, 1)
        return [[row["group"], row["decoder"]] for row in rows], [[row[name] for name in FIGURES] for row in rows]

    ((names, alone),) = run_on_ranks(1, look)
    assert names == [[group, "linear"] for group in GROUPS]
    for world_size in (2, 3):
        for found, figures in run_on_ranks(world_size, look):
            assert found == names
            assert torch.allclose(torch.tensor(figures), torch.tensor(alone), atol=1e-6)


def test_variables_are_numbered_in_order_of_their_values(tmp_path):
    file = tmp_path / "source.parquet"
    pd.DataFrame({"index": [5, 2, 9], "source": ["web", "lab", "web"]}).to_parquet(file)
    label, index = torch.tensor([1, 0, 1, 1]), torch.tensor([2, 5, 9, 2])
    codes = Variables({"source": file}).codes(label, index, 3)
    assert list(codes) == ["label", "source"]
    assert codes["label"] == (label, 3)
    assert (codes["source"][0].tolist(), codes["source"][1]) == ([0, 1, 1, 0], 2)


def test_files_that_do_not_tell_a_variable_are_refused(tmp_path):
    file = tmp_path / "wrong.parquet"
    for table, text in [
        ({"index": [1], "other": [2]}, r"expected also \['source'\]"),
        ({"index": [1, 1], "source": [2, 3]}, "names a sample twice"),
        ({"index": [1, 2], "source": ["a", None]}, "leaves source open"),
    ]:
        pd.DataFrame(table).to_parquet(file)
        with pytest.raises(ValueError, match=text):
            UsableInformation(targets={"source": file})
    with pytest.raises(ValueError, match="there is no file"):
        UsableInformation(targets={"source": tmp_path / "absent.parquet"})
    with pytest.raises(ValueError, match="another name"):
        UsableInformation(targets={"label": file})


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_runs_that_could_report_nothing_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match=r"LQF trains no network.*Set callbacks=\[linear_probe\]"):
        train(LQF(build_backbone(), CLASSES, optimizer=SGD), UsableInformation())
    with pytest.raises(ValueError, match=r"there are none.*callbacks.usable_information.report_on=train"):
        train(tuned(), UsableInformation(), samples=data(val=None))
    with pytest.raises(ValueError, match="at least 4 images of val to choose and judge on, got 3"):
        train(tuned(), UsableInformation(), samples=data(val=(VAL[0][:3], VAL[1][:3])))
    with pytest.raises(ValueError, match=r"`groups` .* is \['stage7'\].*Set callbacks.usable_information.groups=null"):
        train(tuned(), UsableInformation(groups=["head", "stage7"]))
    for name, value in [("report_on", "test"), ("decoders", ["tree"]), ("max_samples", 0), ("every_n_epochs", 0)]:
        with pytest.raises(ValueError, match=rf"Set callbacks.usable_information.{name}="):
            UsableInformation(**{name: value})


def test_the_picture_has_a_panel_per_variable_and_decoder():
    rows = [
        {"epoch": epoch, "group": group, "variable": variable, "decoder": decoder, "bits": bits, "entropy": 2.0}
        for epoch, group, bits in [(0, "stem", -0.5), (0, "head", 0.25), (3, "stem", 0.5), (3, "head", 1.5)]
        for variable, decoder in [("label", "linear"), ("label", "mlp"), ("source", "linear")]
    ]
    figure = draw_usable_information(pd.DataFrame(rows))
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == [
        "label (linear decoder)", "label (mlp decoder)", "source (linear decoder)",
    ]  # fmt: skip
    for axes in panels:
        assert axes.images[0].get_array().tolist() == [[0.0, 0.5], [0.25, 1.5]]
        assert axes.images[0].get_clim() == (0.0, 2.0)
        assert [text.get_text() for text in axes.get_yticklabels()] == ["stem", "head"]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "3"]


def test_a_run_tells_what_its_layers_know(tmp_path, folder_of_shapes):
    known = tmp_path / "parity.parquet"
    pd.DataFrame({"index": range(60), "parity": [index % 2 for index in range(60)]}).to_parquet(known)
    options = [
        "method=finetune", "method.batch_norm=frozen", "callbacks=usable_information", "trainer.max_epochs=1",
        "data/augmentation=none", "callbacks.usable_information.groups=[stage4,head]",
        f"+callbacks.usable_information.targets.parity={known}",
    ]  # fmt: skip
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork"]
    tables = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        run_tiny(folder, folder_of_shapes, *options, *ranks, f"trainer.devices={world_size}")
        tables.append(pd.read_parquet(folder / "usable_information.parquet"))
        written = json.loads((folder / "metrics.json").read_text())
        rows = tables[-1].set_index(["epoch", "variable", "group"])["bits"]
        assert written["val/usable_bits/stage4"] == pytest.approx(rows[1, "label", "stage4"])
        assert written["val/usable_bits_parity/head"] == pytest.approx(rows[1, "parity", "head"])
    assert len(tables[0]) == 8
    pd.testing.assert_frame_equal(*tables, atol=1e-3)
    short = pd.DataFrame({"index": [0], "parity": [0]})
    short.to_parquet(known)
    with pytest.raises(ValueError, match=r"parity is not known of 3\d samples of train, val"):
        run_tiny(tmp_path / "short", folder_of_shapes, *options)
