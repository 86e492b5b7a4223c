"""The requests that a model has answered, and how far the last one has come."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lqf_lightning.data.cohort import Cohort
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.deletion.certificate import NAME as CERTIFICATE
from lqf_lightning.deletion.certificate import verify_certificate
from lqf_lightning.deletion.content_hash import file_hash
from lqf_lightning.deletion.purge import Removed, purge_run
from lqf_lightning.run_folder import write_json

NAME = "forgetting.json"
Record = Callable[[Removed, Mapping[str, Any]], None]


class Journal:
    """``forgetting.json`` of a run folder: every request so far, none of which names its samples.

    A request is "scrubbing" until the new model, its report and its certificate are written (the old run is whole and
    the model in use), then "scrubbed" (the new model is the one in use; the old run is being purged), then "purged".
    Only while it is "scrubbed" does the file say which samples to purge and where: a scrub that was interrupted leaves
    a folder that names none, and so does one whose purge is done.

    Args:
        folder: The run folder.
        requests: One entry per request.
        pending: What the purge of the last request needs; empty: nothing is left to do.
    """

    def __init__(
        self, folder: Path, requests: Sequence[Mapping[str, Any]] = (), pending: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.requests = [dict(entry) for entry in requests]
        self.pending = dict(pending or {})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the journal of a run.

        Args:
            folder: The run folder.

        Returns:
            The journal, without entries where the run never forgot anything.
        """
        file = folder / NAME
        content = json.loads(file.read_text()) if file.is_file() else {}
        return cls(folder, content.get("requests", ()), content.get("pending"))

    @classmethod
    def refuse_folders(cls, folder: Path, old: Path) -> None:
        """Check that a request on one run can be answered in a folder; nothing is written.

        Args:
            folder: The new run folder.
            old: The old one.

        Raises:
            ValueError: The folders are the same, the new one has answered a request already or holds another run, or
                the old one is not finished with its last.
        """
        if folder.resolve() == old.resolve():
            raise ValueError(
                f"{folder} is the run itself. Set hydra.run.dir to a new folder for the model that forgets"
            )
        own, earlier = cls.read(folder), cls.read(old)
        if own.requests and own.state != "scrubbing":
            raise ValueError(f"{folder} has answered a request already. Set hydra.run.dir to a new folder")
        if not own.requests and any((folder / "checkpoints").glob("*.ckpt")):
            raise ValueError(f"{folder} holds another run, which would be lost. Set hydra.run.dir to a new folder")
        if earlier.requests and earlier.state != "purged":
            raise ValueError(
                f"the last request of {old} is {earlier.state}, not purged: finish it before the next one, with "
                f"lqf-forget finish={old}"
            )

    @classmethod
    def begin(cls, folder: Path, old: Path, cohort: Cohort, weights: str, date: str) -> Self:
        """Open the journal of a new run folder with a request, behind those that the old run answered.

        Args:
            folder: The new run folder.
            old: The old one, whose ``manifest.parquet`` still names the samples.
            cohort: Which to forget.
            weights: Hash of the old weights.
            date: When.

        Returns:
            The journal, written.
        """
        cls.refuse_folders(folder, old)
        earlier = cls.read(old)
        paths = Manifest.read(old / "manifest.parquet").table.loc[cohort.indices.tolist(), "path"].tolist()
        position = len(earlier.requests) + 1
        entry = {"position": position, "date": date, "number": len(cohort), "cohort": cohort.spec, "run": old.name}
        entry |= {"state": "scrubbing", "hashes": {"weights_before": weights}}
        pending = {"old": str(old.resolve()), "indices": cohort.indices.tolist(), "paths": paths}
        journal = cls(folder, [*earlier.requests, entry], pending)
        journal.write()
        return journal

    @property
    def state(self) -> str:
        """How far the last request has come; "none" without requests."""
        return str(self.requests[-1]["state"]) if self.requests else "none"

    def scrubbed(self, weights: str) -> None:
        """Declare the new model the one in use: its checkpoint, report and certificate are written.

        Args:
            weights: Hash of the new weights.

        Raises:
            RuntimeError: There is no request, or the files do not agree with the certificate.
        """
        if not self.requests:
            raise RuntimeError(f"{self.folder} has no request to answer; call Journal.begin first")
        if wrong := verify_certificate(self.folder):
            raise RuntimeError(f"{self.folder} does not agree with its certificate: {'; '.join(wrong)}")
        entry = self.requests[-1]
        entry["hashes"] |= {"weights_after": weights, "certificate": file_hash(self.folder / CERTIFICATE)}
        entry |= {"certificate": CERTIFICATE, "state": "scrubbed"}
        self.write()

    def write(self) -> None:
        """Write the journal, whole or not at all."""
        told = self.pending and self.state == "scrubbed"
        write_json(self.folder / NAME, {"requests": self.requests} | ({"pending": self.pending} if told else {}))


def finish_request(folder: Path, record: Record | None = None) -> Removed:
    """Purge the old run of a request whose new model is written; may be called again after an interruption.

    Args:
        folder: The new run folder.
        record: Called with what was removed and what the journal knows of the samples, before it drops that.

    Returns:
        What was removed this time; nothing where the request was finished already.

    Raises:
        RuntimeError: The new model was never completed, so that the old one has to stay.
    """
    journal = Journal.read(folder)
    if journal.state in ("none", "scrubbing"):
        raise RuntimeError(
            f"the new model in {folder} is not complete (state {journal.state}), and the old one is untouched. Start "
            "lqf-forget again"
        )
    if journal.state == "purged":
        return Removed([], [], [])
    pending = journal.pending
    removed = purge_run(Path(pending["old"]), pending["indices"], pending["paths"])
    if record is not None:
        record(removed, pending)
    journal.requests[-1]["state"], journal.pending = "purged", {}
    journal.write()
    return removed
