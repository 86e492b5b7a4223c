"""The files of a request that has been answered: a new run folder, and an old one without the samples."""

import datetime
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lqf_lightning.analysis.answer_request import Answered
from lqf_lightning.analysis.trained_elsewhere import prefix_of_trained
from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.deletion.certificate import write_certificate
from lqf_lightning.deletion.checkpoint import scrubbed_checkpoint, write_checkpoint
from lqf_lightning.deletion.content_hash import tensors_hash
from lqf_lightning.deletion.filter_file import filter_file
from lqf_lightning.deletion.journal import NAME as JOURNAL
from lqf_lightning.deletion.journal import Journal, finish_request
from lqf_lightning.deletion.judgement import judge
from lqf_lightning.deletion.limits import not_covered, plain_config
from lqf_lightning.deletion.purge import Removed
from lqf_lightning.deletion.remains import remains
from lqf_lightning.deletion.report import write_report
from lqf_lightning.deletion.traces import Traces
from lqf_lightning.methods import Method
from lqf_lightning.run_folder import write_json
from lqf_lightning.sample_files import keep_sample_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A request and the run that it is about.

    Attributes:
        checkpoint: Of the old run.
        folder: The new run folder.
        run: Configuration of the run.
        cohort: The samples.
        previous: Manifest of the old run, which still names them.
        data: Data module of the run.
        method: Its method.
        gone: How many of the samples have no file any more.
    """

    checkpoint: Path
    folder: Path
    run: DictConfig
    cohort: Cohort
    previous: Manifest
    data: ImageDataModule
    method: Method
    gone: int = 0

    @property
    def old(self) -> Path:
        """The old run folder."""
        return self.checkpoint.parent.parent

    @property
    def paths(self) -> list[str]:
        """Paths of the samples."""
        names: list[str] = self.previous.table.loc[self.cohort.indices.tolist(), "path"].tolist()
        return names

    def begin(self) -> Journal:
        """Open the journal; nothing of the old run is touched, and the new folder names the samples no more.

        Returns:
            The journal.
        """
        self.data.manifest.forget(self.cohort.indices).write(self.folder / "manifest.parquet")
        forget_command(self.folder)
        weights = tensors_hash(torch.load(self.checkpoint, map_location="cpu", weights_only=True)["state_dict"])
        return Journal.begin(self.folder, self.old, self.cohort, weights, datetime.date.today().isoformat())

    def complete(self, answered: Answered, journal: Journal, purge: bool) -> None:
        """Write the new run, declare it the one in use, and purge the old one; for one process to call.

        Args:
            answered: The new weights and what is known of them.
            journal: Of the request.
            purge: Whether to delete what the old run holds of the samples; if a check of the new model failed, that
                waits for `finish`.
        """
        file, prefix = self.folder / "checkpoints" / "last.ckpt", prefix_of_trained(self.method)
        content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        buffers = {prefix + name: value for name, value in (answered.buffers or {}).items()}
        released = scrubbed_checkpoint(content, answered.released, prefix, buffers)
        weights = tensors_hash(released["state_dict"])
        write_checkpoint(released, file)
        self._write_data(answered)
        report = self._report(answered, journal, weights)
        write_json(self.folder / "report.json", report)
        contents = self.previous.table.loc[self.cohort.indices.tolist(), "sha"].tolist()
        receipt = write_certificate(self.folder, file, prefix, contents, _statement(report))
        write_report(self.folder, report)
        journal.scrubbed(weights)
        log.info("receipt of the request, written nowhere else: %s", receipt)
        if purge and report["judgement"]["passed"]:
            finish(self.folder)
            return
        log.info("%s", report["judgement"]["verdict"])
        if purge:
            log.warning(
                "nothing was deleted: the new model is not to be released, so the old one stays. See report.html; ask "
                "again in a new folder, or delete all the same with lqf-forget finish=%s",
                self.folder,
            )

    def _write_data(self, answered: Answered) -> None:
        self.data.manifest.write(self.folder / "manifest.parquet")
        OmegaConf.save(OmegaConf.create(plain_config(self.run)), self.folder / "config.yaml")
        keep_sample_files(self.run, self.folder)
        traces = Traces(self.cohort.indices.tolist(), self.paths)
        for copy in self.folder.glob("data_*"):
            filter_file(copy, traces)
        if answered.kernel is not None:
            answered.kernel.write(self.folder)

    def _report(self, answered: Answered, journal: Journal, weights: str) -> dict[str, Any]:
        rows = self.previous.table.loc[self.cohort.indices.tolist()]
        there = self.previous.rows("train")["index"]
        report: dict[str, Any] = {
            "request": {
                "cohort": self.cohort.spec, "number": len(self.cohort), "run": self.old.name, "files_gone": self.gone,
                "classes": {str(name): int(n) for name, n in rows["class"].value_counts().items()},
                "train_before": len(there), "train_after": len(there) - len(self.cohort),
                "date": journal.requests[-1]["date"], "position": journal.requests[-1]["position"],
            },
            **answered.report,
            "not_covered": not_covered(
                self.method, self.run, self.previous, self.gone, chosen=self.checkpoint.stem != "last"
            ),
            "hashes": {"weights before": journal.requests[-1]["hashes"]["weights_before"], "weights after": weights},
            "removed": None,
        }  # fmt: skip
        return report | {"judgement": judge(report)}


def finish(folder: Path) -> Removed:
    """Purge the old run of a request whose new model is written, and write down what was deleted.

    Args:
        folder: The new run folder; gets ``removed.json``, and ``report.html`` once more.

    Returns:
        What was removed this time.
    """
    return finish_request(folder, partial(_record, folder))


def _record(folder: Path, removed: Removed, pending: Mapping[str, Any]) -> None:
    found = [
        f"{place.name}/{what}"
        for place in (Path(pending["old"]), folder)
        for what in remains(place, pending["indices"], pending["paths"])
        if not (place == folder and what.startswith(JOURNAL))  # which drops them next
    ]
    section = {
        "deleted": removed.deleted, "filtered": removed.filtered, "not_inspected": removed.not_inspected,
        "remains": found,
    }  # fmt: skip
    report = json.loads((folder / "report.json").read_text()) | {"removed": section}
    judgement = judge(report)
    write_report(folder, report | {"judgement": judgement})
    write_json(folder / "removed.json", section)
    log.info("%s", judgement["verdict"])


def forget_command(folder: Path) -> None:
    """Take the cohort out of the command line that ``environment.json`` keeps.

    Args:
        folder: The run folder.
    """
    file = folder / "environment.json"
    content = json.loads(file.read_text())
    known = ["cohort=..." if "cohort=" in argument else argument for argument in content["command"]]
    write_json(file, content | {"command": known})


def _statement(report: dict[str, Any]) -> dict[str, Any]:
    scrub, bound, request = report["scrub"], report["bound"], report["request"]
    return {
        "requested": {name: request[name] for name in ("number", "cohort", "date", "position", "run")},
        "done": {name: scrub[name] for name in ("name", "steps", "passes", "noise", "distance_bound", "tolerance")},
        "verified_relative_gradient": scrub["verified_relative_gradient"],
        "bound": {name: bound[name] for name in ("nats", "intercept_nats", "assumes")},
        "passed": report["judgement"]["passed"],
    }
