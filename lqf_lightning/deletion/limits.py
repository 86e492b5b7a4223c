"""What a certificate does not speak about."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from lqf_lightning.data import Manifest
from lqf_lightning.methods import LQF, Method


def not_covered(
    method: Method, run: DictConfig, manifest: Manifest, files_gone: int, *, chosen: bool = False
) -> list[str]:
    """List the ways in which the samples may have left traces that no scrub of the weights removes.

    Args:
        method: The method.
        run: Configuration of the run.
        manifest: Of the run, with the samples.
        files_gone: How many of the samples have no file any more.
        chosen: Whether the checkpoint is one of several that were compared, and not the last.

    Returns:
        Sentences.
    """
    source = OmegaConf.select(run, "backbone.weights")
    points = [
        f"The pre-trained network (backbone.weights={source}): whatever it was trained on, it stays as it is. If the "
        "samples, or copies of them, were among its training data, they are still in it.",
        "The initialization of the head: it is drawn at random and knows no sample. A head that was fitted to data "
        "before, or loaded with the network, knows the data that it was fitted to.",
        _statistics(method),
        "Normalization constants of the images are those of the pre-trained network, not of this data set.",
        _choices(method, run, chosen),
        "Copies elsewhere: backups, exported or deployed models, predictions, and what was uploaded to Weights & "
        "Biases (runs, tables, pictures, artifacts). Delete them where they are.",
        "The image files themselves, which belong to the data set and not to the run.",
    ]
    removed = manifest.table.loc[manifest.table["split"] != "train", "sha"]
    if bool(manifest.table.loc[manifest.table["split"] == "train", "sha"].isin(set(removed) - {""}).any()):
        points.append("Some training images are in the validation or test split too: those copies are not forgotten.")
    if files_gone:
        points.append(f"{files_gone} files were gone already: the model could not be asked about these samples.")
    return points


def _statistics(method: Method) -> str:
    if isinstance(method, LQF):
        return "Batch-norm statistics: frozen at their pre-trained values, so the samples never entered them."
    return (
        "Batch-norm statistics: where training moved them they hold averages over all samples. Re-estimate them on "
        "retained data with callbacks.scrub.options={reestimate: true}."
    )


def _choices(method: Method, run: DictConfig, compared: bool) -> str:
    chosen = []
    if OmegaConf.select(run, "method.ridge") == "auto":
        factors = " and its factors by layer group" if OmegaConf.select(run, "method.metric") == "learned" else ""
        chosen.append(
            f"the ridge ({method.ridge:.3g}){factors}, by leave-one-out on all samples"
            if isinstance(method, LQF)
            else ""
        )
    if compared and not getattr(method, "sweeps", 0):
        chosen.append("the epoch, where the best checkpoint on validation data was taken")
    known = "; ".join(entry for entry in chosen if entry)
    return (
        "Choices that were made while the samples had a say: hyper-parameters, early stopping, the number of epochs"
        + (f". In this run: {known}." if known else ", by you or by a sweep.")
    )


def plain_config(run: DictConfig) -> dict[str, Any]:
    """The configuration of the new run folder: that of the run, without observers and without the request.

    Args:
        run: Configuration of the run, as it was opened.

    Returns:
        Plain values.
    """
    content: dict[str, Any] = OmegaConf.to_container(run, resolve=True)  # type: ignore[assignment]  # it is a mapping
    content |= {"callbacks": None, "logger": None, "checkpoints": None}
    content["data"] |= {"manifest": None}
    return content
