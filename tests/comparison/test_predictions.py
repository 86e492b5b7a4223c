import pytest
import torch
from torch import nn

from lqf_lightning.comparison.predictions import predict
from lqf_lightning.data import FolderSource, ImageDataModule
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, View
from tiny import CLASSES

CPU = torch.device("cpu")


class Means(nn.Module):
    """Linear in the channel means of an image, and in its size."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images):
        return images.shape[-1] * images.mean((2, 3)) @ self.weight


def teacher(seed, classes, size=16, mean=0.5, std=0.25, crop=1.0):
    view = View(size, crop, (mean, mean, mean), (std, std, std))
    return FrozenTeacher(Means(seed), classes, view, f"means {seed}")


@pytest.fixture
def data(folder_of_shapes):
    data = ImageDataModule(FolderSource(str(folder_of_shapes)), image_size=32, batch_size=4, num_workers=0)
    data.setup()
    return data


def by_hand(model, data, split):
    return torch.cat([model(batch.input) for batch in data.view_dataloader(split, model.view)])


def logits(stored, data, split):
    return stored.look_up(torch.tensor(data.manifest.rows(split)["index"].to_numpy()))


def test_every_model_sees_images_as_it_wants_them(data):
    models = [teacher(0, CLASSES), teacher(1, CLASSES, size=24, mean=0.0, std=1.0, crop=0.5), teacher(2, CLASSES)]
    answers = predict(models, data, ["val", "test"], CPU)
    for model, stored in zip(models, answers, strict=True):
        assert (stored.name, stored.classes) == (model.name, model.classes)
        for split in ("val", "test"):
            torch.testing.assert_close(logits(stored, data, split), by_hand(model, data, split), rtol=0, atol=0)
    table = answers[0].table
    assert set(table["split"]) == {"val", "test"}
    assert len(table) == len(data.manifest.rows("val")) + len(data.manifest.rows("test"))
    probabilities = logits(answers[0], data, "test").softmax(-1)
    rows = table[table["split"] == "test"]
    assert rows["prediction"].tolist() == [CLASSES[k] for k in probabilities.argmax(-1)]
    torch.testing.assert_close(torch.tensor(rows["confidence"].to_numpy()), probabilities.amax(-1))


def test_members_of_an_ensemble_keep_their_views_and_are_averaged_by_class_name(data):
    first, second = teacher(0, CLASSES), teacher(1, CLASSES[::-1], size=24, mean=0.0)
    (stored,) = predict([EnsembleTeacher([first, second])], data, ["test"], CPU)
    assert stored.classes == list(CLASSES)
    mean = (by_hand(first, data, "test") + by_hand(second, data, "test").flip(1)) / 2
    torch.testing.assert_close(logits(stored, data, "test"), mean)


def test_images_are_read_once_for_models_that_want_them_alike(data, monkeypatch):
    asked = []
    original = data.view_dataloader
    monkeypatch.setattr(data, "view_dataloader", lambda split, view: asked.append(split) or original(split, view))
    predict([teacher(0, CLASSES), teacher(1, CLASSES), teacher(2, CLASSES, size=8)], data, ["test"], CPU)
    assert asked == ["test", "test"]


def test_a_network_that_is_compared_with_itself_answers_once(data):
    model = teacher(0, CLASSES)
    for answers in predict([model, model], data, ["test"], CPU):
        torch.testing.assert_close(logits(answers, data, "test"), by_hand(model, data, "test"), rtol=0, atol=0)


def test_stored_predictions_are_checked_before_any_network_runs(data, monkeypatch):
    (stored,) = predict([teacher(0, CLASSES)], data, ["test"], CPU)
    network = teacher(1, CLASSES)
    assert predict([stored, network], data, ["test"], CPU)[0] is stored
    monkeypatch.setattr(data, "view_dataloader", lambda *_: pytest.fail("a network runs"))
    with pytest.raises(ValueError, match="no prediction for 11 of 11 val samples"):
        predict([network, stored], data, ["val"], CPU)
