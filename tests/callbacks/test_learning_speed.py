import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Callback
from lqf_lightning.callbacks.learning_speed import LearningSpeed

from lqf_lightning.data import Batch, Stream
from lqf_lightning.data.sample_ledger import SampleLedger
from lqf_lightning.information.learning_speed import learning_speed
from lqf_lightning.information.sample_outcomes import OUTCOMES, sample_outcomes
from lqf_lightning.methods import Finetune
from methods.tensors import CLASSES, build_backbone, build_trainer, fit_on
from old_models import noise_data, outputs_of, write_noise

SCORES = [
    "epochs", "cumulative_correctness", "cumulative_confidence", "cumulative_top_confidence", "mean_margin",
    "mean_loss", "final_loss", "final_correct", "forgetting_events", "first_learned", "never_learned",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """27 training images, so that batches of 6 leave a rest."""
    return write_noise(tmp_path_factory.mktemp("noise") / "images")


def method(lr=0.3, **options):
    return Finetune(build_backbone(0, torch.float32), CLASSES, optimizer=partial(torch.optim.SGD, lr=lr), **options)


def fit(folder, root, *callbacks, epochs=4, trained=None, data=None):
    trainer = build_trainer(epochs, *callbacks, default_root_dir=folder)
    trained = trained or method()
    torch.manual_seed(3)  # dropout
    fit_on(trainer, trained, data or noise_data(root))
    return trained


def read(folder):
    return pd.read_parquet(folder / "learning_speed.parquet")


class Before(Callback):
    """Asks a copy of the network about every training batch before the step, with the same dropout."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append({})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = copy.deepcopy(pl_module.model)(batch.input)
        found = sample_outcomes(logits, batch.target)
        for place, index in enumerate(batch.index.tolist()):
            assert index not in self.epochs[-1]
            self.epochs[-1][index] = [found[name][place].item() for name in OUTCOMES]


class After(Callback):
    """Asks the network about all training images at the end of every epoch, as they are evaluated."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        loader = trainer.datamodule.fixed_train_dataloader()
        with torch.random.fork_rng(devices=[]):
            modes = [(module, module.training) for module in pl_module.modules()]
            logits, index = outputs_of(pl_module, loader)
            target = torch.cat([batch.target for batch in loader])
            for module, mode in modes:
                module.training = mode
        found = sample_outcomes(logits, target)
        rows = zip(*[found[name].tolist() for name in OUTCOMES], strict=True)
        self.epochs.append(dict(zip(index.tolist(), map(list, rows), strict=True)))


def scores_of(epochs, rows):
    """What the observations of every epoch add up to, in order of index; NaN where a sample did not come."""
    nothing = [math.nan] * len(OUTCOMES)
    table = torch.tensor([[epoch.get(index, nothing) for index in rows] for epoch in epochs])
    return {k: v.numpy() for k, v in learning_speed(dict(zip(OUTCOMES, table.unbind(2), strict=True))).items()}


@pytest.mark.parametrize(("evaluate", "watch"), [(False, Before), (True, After)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_sample_is_judged_in_every_epoch(evaluate, watch, drop_last, tmp_path, root):
    seen, data = watch(), noise_data(root, drop_last=drop_last)
    fit(tmp_path, root, seen, LearningSpeed(evaluate=evaluate, per_epoch=True, top=1), data=data)
    table, rows = read(tmp_path), data.manifest.rows("train")
    pd.testing.assert_frame_equal(
        table[["index", "path", "label", "class"]], rows[["index", "path", "label", "class"]].reset_index(drop=True)
    )
    assert list(table)[4:] == SCORES
    for name, values in scores_of(seen.epochs, table["index"]).items():
        np.testing.assert_allclose(table[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    assert table["epochs"].sum() == 4 * (24 if drop_last and not evaluate else 27)
    assert table["forgetting_events"].sum() > 0
    assert 0 < table["final_correct"].mean() < 1
    for number, epoch in enumerate(seen.epochs):
        written = pd.read_parquet(tmp_path / "learning_speed" / f"epoch_{number:04d}.parquet")
        assert sorted(epoch) == written["index"].tolist()
        assert (written["epoch"] == number).all()
        wanted = [epoch[index] for index in written["index"]]
        np.testing.assert_allclose(written[list(OUTCOMES)], wanted, rtol=1e-4, atol=1e-5)
    for picture in ("learning_speed", "learning_speed_hardest", "learning_speed_easiest"):
        assert (tmp_path / "pictures" / f"{picture}.png").exists()


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_run_goes_on_as_if_nobody_had_looked(evaluate, tmp_path, root):
    """The network has dropout and batch norm."""
    alone, watched = fit(tmp_path, root), fit(tmp_path, root, LearningSpeed(evaluate=evaluate, top=1))
    for (name, mine), theirs in zip(alone.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_fresh_fit_starts_over(tmp_path, root):
    callback = LearningSpeed(per_epoch=True, top=1)
    fit(tmp_path / "other", root, callback)
    fit(tmp_path, root, callback, epochs=3)
    first = read(tmp_path)
    fit(tmp_path, root, LearningSpeed(per_epoch=True, top=1), epochs=2)
    assert read(tmp_path)["epochs"].tolist() == [2] * 27
    assert len(list((tmp_path / "learning_speed").iterdir())) == 2  # those of the third epoch are gone
    fit(tmp_path, root, LearningSpeed(top=1), epochs=3)
    pd.testing.assert_frame_equal(read(tmp_path), first)


def test_methods_that_say_nothing_are_refused_after_their_first_epoch(tmp_path, root):
    class Silent(Finetune):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    silent = partial(Silent, build_backbone(0, torch.float32), CLASSES, optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"Silent returned no `logits` .* epoch 0. Set callbacks.learning_speed.eval"):
        fit(tmp_path, root, LearningSpeed(), trained=silent())
    fit(tmp_path, root, LearningSpeed(evaluate=True, top=1), epochs=1, trained=silent())
    assert len(read(tmp_path)) == 27


def test_the_number_of_shown_samples_is_positive():
    with pytest.raises(ValueError, match=r"got 0. Set callbacks.learning_speed.top=24"):
        LearningSpeed(top=0)
    with pytest.raises(ValueError, match=r"must be whole and at least 1, got 2.5"):
        LearningSpeed(top=2.5)


@pytest.mark.gpu
def test_the_batch_hook_never_synchronizes():
    callback, module = LearningSpeed(), SimpleNamespace(stream=Stream())
    callback._ledger = SampleLedger(20, OUTCOMES, "cuda")
    batch = Batch(None, torch.arange(8, device="cuda") % 3, torch.arange(8, device="cuda"))
    logits = torch.randn(8, 3, device="cuda").bfloat16()
    trainer = SimpleNamespace(datamodule=None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        callback.on_train_batch_end(trainer, module, {"logits": logits}, batch, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert callback._ledger.reduce().count.sum() == 8
