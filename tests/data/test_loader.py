from itertools import chain

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics import MeanMetric

from lqf_lightning.data import CropFlip

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Recorder(LightningModule):
    """Trains one number and writes down every training batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.index.tolist(), batch.input.double().sum().item()))
        return self.weight * batch.input.mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, every, resume=None):
    module = Recorder()
    checkpoints = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **every)
    trainer = Trainer(max_epochs=3, callbacks=checkpoints, use_distributed_sampler=False, **QUIET)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("every", "step"),
    [({"every_n_train_steps": 7}, 7), ({"save_on_train_epoch_end": True}, 5), ({"save_on_train_epoch_end": False}, 5)],
)
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(make_module, tmp_path, workers, every, step):
    options = {"augmentation": CropFlip, "num_workers": workers}
    whole = fit(make_module(**options), tmp_path / "ckpt", every)
    assert len(whole) == 15
    (checkpoint,) = (tmp_path / "ckpt").glob(f"*step={step}.ckpt")
    resumed = fit(make_module(**options), tmp_path / "ckpt", every, checkpoint)
    assert resumed == whole[step:]


def test_the_position_counts_batches_that_were_handed_out(make_module):
    loader = make_module().train_dataloader()
    loader.order.set_epoch(4)
    batches = iter(loader)
    expected = [next(batches).index.tolist() for _ in range(5)]
    fresh = make_module().train_dataloader()
    fresh.load_state_dict({"epoch": 4, "batches": 3})
    fresh.order.set_epoch(4)
    assert [batch.index.tolist() for batch in fresh] == expected[3:]
    assert [batch.index.tolist() for batch in fresh] == expected  # left out once
    assert loader.state_dict() == {"epoch": 4, "batches": 5}


class Evaluator(Recorder):
    def on_validation_epoch_start(self):
        self.mean = MeanMetric()
        self.shares = []

    def validation_step(self, batch, batch_idx):
        self.mean.update(batch.index.double())
        self.shares += batch.index.tolist()

    def on_validation_epoch_end(self):
        means = self.mean.compute()
        everyone = [None] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(everyone, self.shares)
        else:
            everyone = [self.shares]
        self.trainer.callback_metrics["mean"] = means
        self.trainer.callback_metrics["most"] = torch.tensor(max(map(len, everyone)))
        self.trainer.callback_metrics["all"] = torch.tensor(sorted(chain.from_iterable(everyone)))


@pytest.mark.parametrize("samples", [1, 5])
def test_uneven_and_empty_shares_are_evaluated_exactly(make_module, split_folder, samples):
    results = []
    for devices in (1, 2, 3):
        data = make_module(shots=4)
        table = data.manifest.table
        table.loc[table["split"] == "test", "split"] = "other"
        table.loc[table.index[table["split"] == "val"], "split"] = "other"
        table.loc[table.index[-samples:], "split"] = "val"
        strategy = {"strategy": "ddp_fork"} if devices > 1 else {}
        trainer = Trainer(
            devices=devices, use_distributed_sampler=False, enable_checkpointing=False, **strategy, **QUIET
        )
        trainer.validate(Evaluator(), datamodule=data, verbose=False)
        results.append(trainer.callback_metrics)
    for result, devices in zip(results, (1, 2, 3), strict=True):
        assert result["all"].tolist() == table.index[-samples:].tolist()
        assert result["mean"] == table.index[-samples:].to_series().mean()
        assert result["most"] == -(-samples // devices)
