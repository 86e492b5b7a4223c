import gzip
import json
import pickle
import struct
from hashlib import md5
from urllib.error import URLError

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from torchvision import datasets

from lqf_lightning.data import TorchvisionSource
from lqf_lightning.data.torchvision_source import _KNOWN

RNG = np.random.default_rng(0)


def jpeg(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), color).save(path)


def write_cifar10(root, monkeypatch):
    """The pickled batches of the official archive, with two images per batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def dump(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5((folder / name).read_bytes()).hexdigest()]

    def batch(first):
        rows = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
        rows[:, :1024] = first  # the red plane comes first
        return {"data": rows, "labels": [first, 9 - first]}

    train = [dump(f"data_batch_{n}", batch(n - 1)) for n in range(1, 6)]
    test = [dump("test_batch", batch(7))]
    meta = dump("batches.meta", {"label_names": [f"thing{n}" for n in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": meta[1]})


def write_fashion_mnist(root):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 20), ("t10k", 10)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 784)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, header, content in (
            ("images-idx3", struct.pack(">4i", 2051, count, 28, 28), pixels),
            ("labels-idx1", struct.pack(">2i", 2049, count), labels),
        ):
            (folder / f"{name}-{kind}-ubyte").write_bytes(header + content.tobytes())
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + content.tobytes()))


def write_dtd(root):
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{texture}/{texture}_{number}.jpg" for texture in ("banded", "woven")]
        for name, color in zip(names, ("red", "blue"), strict=True):
            jpeg(folder / "images" / name, color)
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(names))


def write_oxford_pets(root):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, number in (("trainval", 1), ("test", 2)):
        pets = {"Abyssinian": ("red", 1), "great_pyrenees": ("blue", 2)}
        for name, (color, _) in pets.items():
            jpeg(folder / "images" / f"{name}_{number}.jpg", color)
        lines = [f"{name}_{number} {label} 1 1" for name, (_, label) in pets.items()]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))


def write_food101(root):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, number in (("train", 1), ("test", 2)):
        names = {dish: [f"{dish}/{number}"] for dish in ("waffles", "apple_pie")}
        jpeg(folder / "images" / "apple_pie" / f"{number}.jpg", "red")
        jpeg(folder / "images" / "waffles" / f"{number}.jpg", "blue")
        (folder / "meta" / f"{split}.json").write_text(json.dumps(names))


def write_fgvc_aircraft(root):
    folder = root / "fgvc-aircraft-2013b" / "data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707 320\nDH 82\n")
    for number, split in enumerate(("train", "val", "test")):
        for color, name, position in (("red", "707 320", 0), ("blue", "DH 82", 1)):
            jpeg(folder / "images" / f"{number}{position}.jpg", color)
            with (folder / f"images_variant_{split}.txt").open("a") as file:
                file.write(f"{number}{position} {name}\n")


def write_flowers102(root, monkeypatch):
    from scipy.io import savemat

    folder = root / "flowers-102"
    for number in range(1, 7):
        jpeg(folder / "jpg" / f"image_{number:05d}.jpg", "red" if number % 2 else "blue")
    savemat(folder / "imagelabels.mat", {"labels": np.array([1, 2] * 3)})
    savemat(folder / "setid.mat", {"trnid": np.array([1, 2]), "valid": np.array([3, 4]), "tstid": np.array([5, 6])})
    files = {
        key: (name, md5((folder / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", {**datasets.Flowers102._file_dict, **files})


def write_stanford_cars(root):
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = [("fname", object), ("class", np.int64)]
    for split, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        jpeg(folder / f"cars_{split}" / "1.jpg", "red")
        jpeg(folder / f"cars_{split}" / "2.jpg", "blue")
        savemat(folder / path, {"annotations": np.array([("1.jpg", 1), ("2.jpg", 2)], dtype=kind)})
    names = np.array(["AM Hummer", "Acura RL"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})


def offline(*_, **__):
    raise URLError("no route to host")


def test_cifar10_is_read_with_its_labels_and_planes(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    splits = TorchvisionSource("cifar10", tmp_path).load()
    train, test = splits["train"], splits["test"]
    assert train.labels == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert test.labels == [7, 2]
    assert train.classes[9] == "thing9"
    assert train.paths[3] == "train/3"
    image = np.asarray(train.images.read(3))
    assert image.shape == (32, 32, 3)
    assert (image[..., 0] == 1).all()


def test_damaged_archives_are_not_trained_on(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"broken")
    with pytest.raises(FileNotFoundError, match=r"cifar10: .*corrupted.*data\.source\.download=true"):
        TorchvisionSource("cifar10", tmp_path, download=False).load()


def test_fashion_mnist_becomes_rgb(tmp_path):
    write_fashion_mnist(tmp_path)
    splits = TorchvisionSource("fashion_mnist", tmp_path).load()
    assert splits["train"].labels == list(range(10)) * 2
    assert splits["test"].classes[9] == "Ankle boot"
    assert (np.asarray(splits["train"].images.read(13)) == np.full((28, 28, 3), 13)).all()


@pytest.mark.parametrize(
    ("name", "write", "classes"),
    [
        ("dtd", write_dtd, ["banded", "woven"]),
        ("oxford_pets", write_oxford_pets, ["Abyssinian", "Great Pyrenees"]),
        ("food101", write_food101, ["apple_pie", "waffles"]),
        ("fgvc_aircraft", write_fgvc_aircraft, ["707 320", "DH 82"]),
        ("flowers102", write_flowers102, ["pink primrose", "hard-leaved pocket orchid"]),
        ("stanford_cars", write_stanford_cars, ["AM Hummer", "Acura RL"]),
    ],
)
def test_images_in_files_belong_to_their_labels(tmp_path, monkeypatch, name, write, classes):
    write(tmp_path, monkeypatch) if name == "flowers102" else write(tmp_path)
    splits = TorchvisionSource(name, tmp_path).load()
    assert set(splits) == set(_KNOWN[name].splits)
    paths = [path for samples in splits.values() for path in samples.paths]
    assert len(set(paths)) == len(paths) == 2 * len(splits)
    for samples in splits.values():
        assert list(samples.classes)[:2] == classes
        for position, label in enumerate(samples.labels):
            red, _, blue = samples.images.read(position).getpixel((4, 3))
            assert (red > blue) == (label == 0)


def test_an_interrupted_extraction_names_the_first_missing_file(tmp_path):
    write_dtd(tmp_path)
    (tmp_path / "dtd/dtd/images/woven/woven_2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 files .*woven_2\.jpg.* delete {tmp_path}/dtd and"):
        TorchvisionSource("dtd", tmp_path).load()


@pytest.mark.parametrize("name", sorted(set(_KNOWN) - {"stanford_cars"}))
def test_without_a_network_the_message_says_where_the_files_belong(tmp_path, monkeypatch, name):
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(FileNotFoundError, match=rf"{name} is not in {tmp_path} and the download failed: .*Put"):
        TorchvisionSource(name, tmp_path).load()


def test_a_set_that_is_no_longer_offered_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stanford_cars .*can no longer be downloaded.*cars_train/.*root="):
        TorchvisionSource("stanford_cars", tmp_path).load()


def test_missing_scipy_is_explained(tmp_path, monkeypatch):
    write_flowers102(tmp_path, monkeypatch)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(ModuleNotFoundError, match=r"flowers102 keeps its labels .* pip install scipy"):
        TorchvisionSource("flowers102", tmp_path).load()


@pytest.mark.parametrize(("name", "nearest"), [("CIFAR-10", "cifar10"), ("pets", "oxford_pets"), ("aircraft", "fgvc")])
def test_unknown_names_are_answered_with_the_nearest(tmp_path, name, nearest):
    with pytest.raises(ValueError, match=rf"no data set named '{name}'; did you mean data\.source\.name={nearest}"):
        TorchvisionSource(name, tmp_path)


def test_processes_wait_for_the_one_that_downloads(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)
    monkeypatch.setattr(FileLock, "acquire", lambda self, **_: pytest.fail(f"waits for {self.lock_file}"))
    with pytest.raises(pytest.fail.Exception, match=rf"waits for {tmp_path}/\.fashion_mnist\.lock"):
        TorchvisionSource("fashion_mnist", tmp_path).load()


def test_a_folder_that_cannot_be_written_is_still_read(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    assert len(TorchvisionSource("fashion_mnist", tmp_path).load()["train"].labels) == 20
