"""Images that are to be held out, but that an earlier run was trained on."""

from pathlib import Path

from lqf_lightning.data.manifest import Manifest


def seen_in_training(manifest: Manifest, split: str, *others: Path) -> int:
    """Count the images of a split that models were trained on, by content, whatever their files are called.

    Args:
        manifest: The samples of this run; those without hash count as unseen.
        split: train, val or test.
        *others: Manifests of the runs that the models are of.

    Returns:
        Number of samples of the split that are among the used training samples of any of these runs, labeled or not.
    """
    seen: set[str] = set()
    for other in others:
        seen.update(Manifest.read(other).training_rows()["sha"])
    return int(manifest.rows(split)["sha"].isin(seen - {""}).sum())
