"""What the frozen core of a mixed-privacy model was trained on, as far as its run folder tells."""

import logging
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from lqf_lightning.data import Manifest
from lqf_lightning.data.seen_in_training import manifest_behind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CoreOrigin:
    """Where core weights come from.

    Attributes:
        source: In words: a package, a file with the start of its hash, or "random".
        manifest: List of the samples that they were trained on; None where no run folder tells.
        trained_on: SHA-256 over the sorted content hashes of these samples.
        samples: Their number.
    """

    source: str
    manifest: str | None = None
    trained_on: str | None = None
    samples: int | None = None

    @classmethod
    def find(cls, source: str, weights: str | None) -> "CoreOrigin":
        """Look beside the weights for the list of the samples that they were trained on.

        Args:
            source: Where they come from, in words.
            weights: The option `backbone.weights`; only files of a run folder tell.

        Returns:
            What is known.
        """
        manifest = manifest_behind(weights)
        if manifest is None:
            return cls(source)
        contents = _contents(manifest)
        digest = sha256("\n".join(contents).encode()).hexdigest()
        return cls(source, str(manifest), digest, len(contents))

    def as_dict(self) -> dict[str, str | int | None]:
        """The same for checkpoints.

        Returns:
            Values by name.
        """
        return asdict(self)

    def refuse_overlap(self, manifest: Manifest) -> None:
        """Check by content that the core has seen none of the samples that may have to be forgotten.

        What its run has been made to forget since is not known to it any more, and not found.

        Args:
            manifest: Samples of the run that trains user weights; those without hash get one.

        Raises:
            ValueError: The core was trained on some of them.
        """
        if self.manifest is None or not Path(self.manifest).is_file():
            log.info("core from %s: no run folder tells what it was trained on, so nothing is compared", self.source)
            return
        manifest.hash_contents()
        ours = manifest.training_rows()
        both = ours[ours["sha"].isin(set(_contents(Path(self.manifest))) - {""})]
        if len(both):
            raise ValueError(
                f"{len(both)} of the {len(ours)} training images were used to train the core ({self.source}) too, so "
                f"zeroing the user weights would not forget them; the first is {both['path'].iloc[0]}. Train the core "
                "with data.core=... data.part=core, and this run with the same data.core and data.part=user, or with "
                f"data.manifest={self.manifest} data.part=user; images that are there twice, leave out"
            )
        log.info("core from %s: none of the %d training images was used to train it", self.source, len(ours))


def _contents(manifest: Path) -> list[str]:
    return sorted(Manifest.read(manifest).training_rows()["sha"])
