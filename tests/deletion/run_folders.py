"""A run folder as training and its callbacks leave it, small enough to be made for every test."""

import json

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from lqf_lightning.data import FolderSource, ImageDataModule

COHORT = [3, 7]


def write_run(folder, images, outside):
    """Writes the folder, and a kernel and a subset outside of it; returns the paths of the cohort."""
    data = ImageDataModule(FolderSource(images))
    data.setup()
    data.manifest.write(folder / "manifest.parquet")
    rows = data.manifest.rows("train")
    paths = data.manifest.table.loc[COHORT, "path"].tolist()
    scores = rows[["index", "path", "label", "class"]].assign(score=0.5)
    (folder / "learning_speed").mkdir()
    scores.to_parquet(folder / "learning_speed.parquet", index=False)
    scores[["index", "score"]].to_parquet(folder / "learning_speed" / "epoch_0000.parquet", index=False)
    scores.to_csv(folder / "scores.csv", index=False)
    for name in ("sample_information", "sample_information_groups", "leave_one_out"):
        scores.to_parquet(folder / f"{name}.parquet", index=False)
    pairs = pd.DataFrame({"index": [0, 1], "path": ["x", "y"], "most_influential_index": [3, 5], "value": [1.0, 2.0]})
    pairs.to_parquet(folder / "pairs.parquet", index=False)
    pd.DataFrame({"penalty": [0.1], "val_acc": [0.9]}).to_parquet(folder / "tradeoff_curve.parquet", index=False)
    scores[["index"]].to_parquet(folder / "data_subset.parquet", index=False)
    scores[["path"]].assign(weight=2.0).to_csv(folder / "data_weights.csv", index=False)
    for part in ("checkpoints", "wandb/offline-run-1/files/media/table", "pictures", "csv", "own"):
        (folder / part).mkdir(parents=True)
    for name in ("best", "last"):
        state = {"state_dict": {"dw.w": torch.ones(3)}, "optimizer_states": [torch.ones(3)], "epoch": 1}
        torch.save(state, folder / "checkpoints" / f"{name}.ckpt")
    (folder / "wandb" / "offline-run-1" / "files" / "media" / "table" / "easiest.table.json").write_text(
        json.dumps({"columns": ["index", "path"], "data": [[3, paths[0]]]})
    )
    (folder / "wandb" / "offline-run-1" / "run-1.wandb").write_bytes(b"\0\1" + paths[0].encode() + b"\0")
    (folder / "pictures" / "easiest.png").write_bytes(b"\x89PNG")
    (folder / "csv" / "metrics.csv").write_text("epoch,val/acc\n0,0.5\n")
    (folder / "train.log").write_text(f"the loss of {paths[1]} is large\n")
    (folder / "other.log").write_text("training went well\n")
    (folder / "metrics.json").write_text('{"val/acc": 0.5}')
    (folder / "environment.json").write_text('{"command": ["lqf-train"]}')
    (folder / "curation.json").write_text('{"suspects": {"index": [1, 7]}}')
    (folder / "note.docx").write_bytes(b"whatever")
    (folder / "own" / "keep.npy").write_bytes(b"mine")
    parts = {"tensor": torch.ones(4, 4), "index": torch.tensor([3, 7, 9])}
    for place in (folder / "kernel", outside / "kernel"):
        place.mkdir(parents=True)
        save_file(parts, place / f"{'0123' * 8}.safetensors")
        save_file(parts, place / "model.safetensors")
    (outside / "kernel" / "of_others.txt").write_text("kept")
    scores[["index"]].to_parquet(outside / "subset.parquet", index=False)
    (folder / "config.yaml").write_text(
        f"data: {{subset: {outside / 'subset.parquet'}, weights: null}}\n"
        f"method: {{kernel_folder: {outside / 'kernel'}}}\n"
        "logger: {wandb: {_target_: lqf_lightning.tracking.wandb_logger}}\n"
    )
    return paths


def snapshot(*folders):
    """The content of every file; tables by their rows, since Parquet need not be equal byte by byte."""
    found = {}
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            table = file.suffix == ".parquet"
            found[str(file)] = pd.read_parquet(file).to_json() if table else file.read_bytes()
    return found


def hits(folder, paths, indices=COHORT):
    """Our own search, apart from the product's: every byte, every table cell, every integer tensor."""
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        found += [(file.name, path) for path in paths if path.encode() in content or path in str(file)]
        if file.suffix in (".parquet", ".csv"):
            table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
            cells = table.astype(str).to_numpy().ravel().tolist()
            found += [(file.name, path) for path in paths if path in cells]
            if "index" in table and file.name != "manifest.parquet":
                found += [(file.name, n) for n in np.intersect1d(table["index"], indices).tolist()]
    return found
