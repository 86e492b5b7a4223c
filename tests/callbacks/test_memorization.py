import pandas as pd
import pytest
import torch
from lightning import Callback
from lqf_lightning.callbacks.memorization import Memorization

from lqf_lightning.methods import Finetune
from methods.tensors import CLASSES, SGD, build_backbone, build_trainer, fit_on
from old_models import noise_data, outputs_of, write_noise
from tiny import run_tiny

NOTHING_TO_VALIDATE = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
RUN = [
    "method=finetune", "callbacks=memorization", "data.subset_ratio=0.7", "test=false", "data.batch_size=7",
    "trainer.max_epochs=1", "method.batch_norm=frozen", "data/augmentation=none", "method.optimizer.lr=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise") / "images")


def read(folder):
    return pd.read_parquet(folder / "memorization_run.parquet")


class Asked(Callback):
    """Asks the network that training ends with about every sample of every split."""

    def on_train_end(self, trainer, pl_module):
        data, self.said = trainer.datamodule, {}
        for loader in (data.every_train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            outputs, index = outputs_of(pl_module, loader)
            self.said |= dict(zip(index.tolist(), outputs.softmax(1), strict=True))


def fit(folder, root, *callbacks, data):
    trainer = build_trainer(2, *callbacks, default_root_dir=folder)
    fit_on(trainer, Finetune(build_backbone(0, torch.float32), CLASSES, optimizer=SGD), data)


@NOTHING_TO_VALIDATE
@pytest.mark.parametrize("held_out", [True, False])
def test_all_samples_of_all_splits_are_asked_whether_used_or_not(held_out, tmp_path, root):
    source = root if held_out else write_noise(tmp_path / "images", {"train": 8})
    data = noise_data(source, subset_ratio=0.7, subset_seed=4, val_fraction=0.2, label_noise=0.3)
    asked = Asked()
    fit(tmp_path, source, asked, Memorization(), data=data)
    table, manifest = read(tmp_path), data.manifest.table
    assert table["index"].tolist() == sorted(asked.said) == manifest["index"].tolist()
    pd.testing.assert_frame_equal(table[["split", "used"]], manifest[["split", "used"]])
    train = table[table["split"] == "train"]
    assert 0 < train["used"].sum() < len(train)
    label = manifest["label"].tolist()  # what the run was told
    for row in table.itertuples():
        probability = asked.said[row.index]
        assert row.correct == (probability.argmax().item() == label[row.index])
        assert row.confidence == pytest.approx(probability[label[row.index]].item(), abs=1e-5)
    assert 0 < table["correct"].mean() < 1


def test_a_run_on_all_samples_is_refused_before_the_first_batch(tmp_path, root):
    with pytest.raises(ValueError, match=r"data.subset_ratio=1 leaves none out. Set data.subset_ratio=0.7"):
        fit(tmp_path, root, Memorization(), data=noise_data(root))


def test_ranks_agree(tmp_path, root):
    """With shares of uneven sizes."""
    results = []
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork"]
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        run_tiny(folder, root, *RUN, *ranks, f"trainer.devices={world_size}", f"data.batch_size={6 + world_size}")
        results.append(read(folder))
    pd.testing.assert_frame_equal(*results, atol=1e-5, rtol=0)
    assert len(results[0]) == 27 + 24 + 21


def test_a_finished_run_says_that_it_lacks_the_file(tmp_path, root, caplog):
    run_tiny(tmp_path, root, *RUN, "callbacks=[]")
    run_tiny(tmp_path, root, *RUN)
    assert "nothing was left to train" in caplog.text
    assert not (tmp_path / "memorization_run.parquet").exists()
