from types import SimpleNamespace

from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lqf_lightning.callbacks.pictures import save_picture
from matplotlib.figure import Figure
from matplotlib.image import imread


class Uploads(WandbLogger):
    """Notes what would be uploaded."""

    def __init__(self):
        self.images = []

    def log_image(self, key, images):
        self.images.append((key, images))


def trainer(folder, *loggers, rank=0):
    return SimpleNamespace(is_global_zero=rank == 0, default_root_dir=str(folder), loggers=list(loggers))


def figure():
    shown = Figure(figsize=(2, 1))
    shown.subplots().plot([0, 1])
    return shown


def test_the_figure_is_written_and_shown(tmp_path):
    wandb = Uploads()
    path = save_picture(trainer(tmp_path / "new", CSVLogger(tmp_path), wandb), figure(), "curve")
    assert path == tmp_path / "new" / "pictures" / "curve.png"
    assert imread(path).shape == (120, 240, 4)
    assert wandb.images == [("pictures/curve", [str(path)])]


def test_uploading_can_wait(tmp_path):
    wandb = Uploads()
    first = save_picture(trainer(tmp_path, wandb), figure(), "curve", upload=False).read_bytes()
    later = figure()
    later.axes[0].plot([1, 0])
    assert save_picture(trainer(tmp_path, wandb), later, "curve", upload=False).read_bytes() != first
    assert wandb.images == []


def test_other_ranks_write_nothing(tmp_path):
    wandb = Uploads()
    assert save_picture(trainer(tmp_path, wandb, rank=1), figure(), "curve") is None
    assert list(tmp_path.iterdir()) == []
    assert wandb.images == []
