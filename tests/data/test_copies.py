from functools import partial
from hashlib import blake2b
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lqf_lightning.data import CropFlip, NoAugmentation, RandAugment, Shift
from lqf_lightning.data.copies import refuse_copies
from methods.dense_lqf import RIDGE, DenseProblem, build, flat
from methods.tensors import build_trainer, fit_on
from ranks import run_on_ranks
from tiny import run_tiny

COPIES = 3


def gathered(loader):
    """Index, target and images of a loader, in order of index."""
    batches = list(loader)
    index, target, images = (torch.cat([getattr(b, name) for b in batches]) for name in ("index", "target", "input"))
    order = index.argsort()
    return index[order], target[order], images[order]


def hashes(loader):
    """What tells the pixels of every sample apart."""
    index, _, images = gathered(loader)
    rows = zip(index.tolist(), images, strict=True)
    return {number: blake2b(image.numpy().tobytes()).hexdigest() for number, image in rows}


def test_copies_follow_the_images_copy_by_copy(make_module):
    data = make_module(augmentation=CropFlip, copies=COPIES, label_noise=0.3, shots=4)
    rows = data.manifest.rows("train")
    index = torch.cat([batch.index for batch in data.fixed_train_dataloader()])
    expected = [image + copy * len(data.manifest) for copy in range(COPIES) for image in rows["index"]]
    assert index.tolist() == expected == sorted(expected)
    assert data.image_of(index).tolist() == [*rows["index"]] * COPIES
    assert data.together(index).tolist() == [*range(len(rows))] * COPIES
    assert gathered(data.fixed_train_dataloader())[1].tolist() == [*rows["label"]] * COPIES
    shuffled = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    alike = data.together(shuffled)[:, None] == data.together(shuffled)
    assert torch.equal(alike, data.image_of(shuffled)[:, None] == data.image_of(shuffled))


def test_one_copy_is_the_image_itself_and_changes_nothing(make_module, tmp_path):
    path = tmp_path / "weights.csv"
    pd.DataFrame({"index": [0, 12], "weight": [2.5, 0.0]}).to_csv(path, index=False)
    plain, one = (make_module(augmentation=CropFlip, weights=path, **o) for o in ({}, {"copies": 1}))
    for name in ("fixed_train_dataloader", "train_dataloader", "every_train_dataloader", "val_dataloader"):
        first, second = (gathered(getattr(data, name)()) for data in (plain, one))
        assert all(map(torch.equal, first, second))
    assert type(one.fixed_train_dataloader().dataset) is type(one.val_dataloader().dataset)
    assert torch.equal(plain.sample_weights, one.sample_weights)
    assert len(one.sample_weights) == len(one.manifest)
    every = torch.arange(len(one.manifest))
    assert torch.equal(one.image_of(every), every)


def test_the_first_samples_are_those_of_a_run_without_copies(make_module):
    plain = gathered(make_module().fixed_train_dataloader())
    copied = gathered(make_module(augmentation=CropFlip, copies=COPIES).fixed_train_dataloader())
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(plain, copied, strict=True))


def test_a_copy_is_its_image_as_the_augmentation_would_move_it(make_module):
    shift = partial(Shift, shift=0.25)  # by up to 2 of 8 pixels
    data = make_module(augmentation=shift, copies=COPIES, shots=5)
    _, _, images = gathered(data.fixed_train_dataloader())
    original, *copies = images.view(COPIES, 15, 3, 8, 8)
    moves = set()
    for copy in copies:
        for image, moved in zip(original, copy, strict=True):
            padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="replicate")
            candidates = padded.unfold(1, 8, 1).unfold(2, 8, 1)  # (3, 5, 5, 8, 8)
            found = (candidates == moved[:, None, None]).all(0).flatten(2).all(2).nonzero()
            assert len(found) == 1
            moves.add(tuple(found[0].tolist()))
    assert len(moves) > 10  # of 25, in 30 draws: images and copies are drawn one by one


def test_draws_depend_on_seed_image_and_copy_alone(make_module):
    options = {"augmentation": RandAugment, "copies": COPIES}
    data = make_module(**options)
    whole = hashes(data.fixed_train_dataloader())
    assert hashes(data.fixed_train_dataloader()) == whole
    assert hashes(make_module(**options, num_workers=2).fixed_train_dataloader()) == whole
    fewer = hashes(make_module(**options, shots=3, eval_batch_size=4).fixed_train_dataloader())
    assert fewer.items() < whole.items()
    more = hashes(make_module(augmentation=RandAugment, copies=COPIES + 1).fixed_train_dataloader())
    assert more.items() > whole.items()
    other, size = hashes(make_module(**options, seed=1).fixed_train_dataloader()), len(data.manifest)
    assert {number for number in whole if whole[number] == other[number]} == {n for n in whole if n < size}
    data.forget(torch.tensor(sorted(whole)[:2]))
    left = {number: kept for number, kept in whole.items() if number % size not in sorted(whole)[:2]}
    assert hashes(data.fixed_train_dataloader()) == left
    assert len(left) == len(whole) - 2 * COPIES


def test_copies_may_be_cached(make_module):
    options = {"augmentation": CropFlip, "copies": COPIES}
    cached, plain = make_module(**options, cache_images=True), make_module(**options)
    for _ in range(2):
        assert hashes(cached.fixed_train_dataloader()) == hashes(plain.fixed_train_dataloader())
    assert len({*hashes(plain.fixed_train_dataloader()).values()}) == 27 * COPIES
    kept = cached.fixed_train_dataloader().dataset
    assert [len(images.cache) for images in kept.copies] == [27] * COPIES


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_copies_without_repeating_any(world_size, make_module):
    options = {"augmentation": CropFlip, "copies": COPIES, "shots": 3, "eval_batch_size": 4}

    def share():
        data = make_module(**options)
        fixed = list(data.fixed_train_dataloader())
        data.sweeps = 2
        sweeps = list(data.train_dataloader())
        half = len(sweeps) // 2
        for part in (sweeps[:half], sweeps[half:]):
            assert torch.cat([b.index for b in part]).equal(torch.cat([b.index for b in fixed]))
            assert torch.cat([b.input for b in part]).equal(torch.cat([b.input for b in fixed]))
        return hashes(fixed), len(sweeps)

    shares = run_on_ranks(world_size, share)
    assert len({length for _, length in shares}) == 1
    assert sum(len(own) for own, _ in shares) == 9 * COPIES
    assert {k: v for own, _ in shares for k, v in own.items()} == hashes(
        make_module(**options).fixed_train_dataloader()
    )


def test_every_copy_has_the_weight_of_its_image(make_module, tmp_path):
    path = tmp_path / "weights.csv"
    pd.DataFrame({"index": [0, 12], "weight": [2.5, 0.0]}).to_csv(path, index=False)
    data = make_module(augmentation=CropFlip, copies=COPIES, weights=path)
    plain = make_module(weights=path).sample_weights
    index = gathered(data.fixed_train_dataloader())[0]
    assert torch.equal(data.sample_weights[index], plain[data.image_of(index)])
    assert {float(w) for w in data.sample_weights[index]} == {0.0, 1.0, 2.5}


def explicit(data):
    """Images and labels of the fixed samples, read one by one, in double precision."""
    known = data.fixed_train_dataloader().dataset
    samples = [known[place] for place in range(len(known))]
    return torch.stack([image for image, _, _ in samples]).double(), torch.tensor([label for _, label, _ in samples])


@pytest.mark.parametrize(("solver", "epochs"), [("kernel", 1), ("cg", 300)])
def test_the_optimum_is_that_of_the_augmented_images_written_out(solver, epochs, make_module):
    options = {"augmentation": CropFlip, "copies": COPIES, "image_size": 6, "shots": 3}
    images, label = explicit(make_module(**options))
    method = build(solver=solver, tolerance=1e-12)
    fit_on(build_trainer(epochs, precision="64-true"), method, make_module(**options))
    problem = DenseProblem(images, label, list(method.linearized.deltas), len(images) * RIDGE)
    best = problem.optimum()
    # Pixels are normalized in single precision in both; what is left is the tolerance times the condition number.
    assert float((flat(method.linearized.deltas) - best).norm() / best.norm()) < 1e-8
    without = DenseProblem(images[:9], label[:9], list(method.linearized.deltas), 9 * RIDGE).optimum()
    assert float((without - best).norm() / best.norm()) > 1e-2


def test_weights_count_for_all_copies_of_an_image(make_module, tmp_path):
    options = {"augmentation": CropFlip, "copies": COPIES, "image_size": 6, "shots": 3}
    data = make_module(**options)
    rows = data.manifest.rows("train")["index"].tolist()
    pd.DataFrame({"index": rows[:2], "weight": [2.0, 0.0]}).to_csv(tmp_path / "weights.csv", index=False)
    method = build(solver="kernel")
    weighted = make_module(**options, weights=tmp_path / "weights.csv")
    fit_on(build_trainer(1, precision="64-true"), method, weighted)
    # A sample of weight 2 is there twice, one of weight 0 not at all, and the ridge is that of the number of samples.
    images, label = explicit(data)
    times = torch.tensor([2, 0, *[1] * 7] * COPIES)
    images, label = images.repeat_interleave(times, 0), label.repeat_interleave(times)
    best = DenseProblem(images, label, list(method.linearized.deltas), 9 * COPIES * RIDGE).optimum()
    assert float((flat(method.linearized.deltas) - best).norm() / best.norm()) < 1e-8


def test_the_advice_counts_images_and_not_copies(make_module):
    method = build(solver="kernel", ridge="auto", metric="learned")
    data = make_module(augmentation=CropFlip, copies=COPIES, image_size=6, shots=4)
    fit_on(build_trainer(1, precision="64-true"), method, data)
    assert "there are only 4 images per class" in method.outlook.words


TINY = (
    "method=lqf_cg", "method.ridge=0.3", "method.solver=cg", "trainer.precision=64-true", "method.tolerance=1e-30",
    "method.acceleration=none", "trainer.max_epochs=3", "test=false", "callbacks=[]", "data.shots=2",
    f"data.copies={COPIES}", "data/augmentation=randaugment",
)  # fmt: skip


def test_a_resumed_run_sees_the_same_copies(tmp_path, folder_of_shapes):
    whole = run_tiny(tmp_path / "whole", folder_of_shapes, *TINY)
    crash = "+callbacks.crash={_target_: crash.CrashAtEpoch, epoch: 1}"
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_tiny(tmp_path / "parts", folder_of_shapes, *TINY, crash)
    parts = run_tiny(tmp_path / "parts", folder_of_shapes, *TINY)
    assert parts["train/objective"] == whole["train/objective"]
    first, second = (torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True) for n in ("whole", "parts"))
    assert all(torch.equal(second["state_dict"][name], value) for name, value in first["state_dict"].items())


@pytest.mark.parametrize("copies", [0, 2.5, True, "3"])
def test_a_number_of_copies_that_is_none_names_its_override(copies, make_module):
    with pytest.raises(ValueError, match=r"whole number of at least 1.*[sS]et data\.copies=1"):
        make_module(augmentation=CropFlip, copies=copies)


@pytest.mark.parametrize("augmentation", [None, NoAugmentation])
def test_equal_copies_are_refused(augmentation, make_module):
    with pytest.raises(ValueError, match=r"data\.copies=2.*NoAugmentation draws nothing.*data/augmentation=crop_flip"):
        make_module(augmentation=augmentation, copies=2)


@pytest.mark.parametrize("method", ["finetune", "lqf_adamw"])
def test_ordinary_training_is_refused_before_the_first_batch(method, tmp_path, folder_of_shapes, monkeypatch):
    monkeypatch.setattr("lqf_lightning.data.dataset.ImageDataset.__getitem__", lambda *_: pytest.fail("a batch"))
    options = (f"method={method}", "callbacks=[]", "data/augmentation=crop_flip", "data.copies=2")
    with pytest.raises(ValueError, match=r"data\.copies=2.*Set data\.copies=1, or method=lqf with method\.solver=cg"):
        run_tiny(tmp_path, folder_of_shapes, *options)


def test_ordinary_batches_are_refused_without_a_trainer(make_module):
    data = make_module(augmentation=CropFlip, copies=2)
    with pytest.raises(ValueError, match=r"data\.copies=2 is for solvers that sweep"):
        data.train_dataloader()


def test_what_tells_images_apart_is_refused_with_words(make_module):
    refuse_copies(make_module(augmentation=CropFlip), "scores per sample")
    refuse_copies(SimpleNamespace(), "scores per sample")
    with pytest.raises(ValueError, match=r"^scores per sample are .* data\.copies=4 .*Set data\.copies=1 and train so"):
        refuse_copies(make_module(augmentation=CropFlip, copies=4), "scores per sample")
