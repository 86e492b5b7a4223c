"""What a model answers on the cohort, on what it may keep, and on samples that it never saw."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.data import Batch
from lqf_lightning.linear import exactly
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.solvers.sample_columns import Column, gather_columns
from lqf_lightning.methods.solvers.training_table import on_device
from lqf_lightning.progress import track


@dataclass(frozen=True)
class AnswersOnSamples:
    """Answers to some samples, by ascending index, the same on every rank and in the memory of the CPU.

    Attributes:
        index: Index of every sample (n,), unique within a split.
        label: Class position (n,).
        logits: Outputs (n, C), in double precision.
    """

    index: Tensor
    label: Tensor
    logits: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the samples whose largest output is that of their class."""
        return float((self.logits.argmax(1) == self.label).double().mean())


@dataclass(frozen=True)
class Answers:
    """Answers of one model.

    Attributes:
        retain: To the training samples outside of the cohort.
        forget: To the cohort.
        test: To the test split, or the validation split where there is no other.
        validation: To the validation split, if it was asked for.
    """

    retain: AnswersOnSamples
    forget: AnswersOnSamples
    test: AnswersOnSamples
    validation: AnswersOnSamples | None = None


class Questions:
    """The samples that models are asked about, as they are evaluated.

    To be made while the data module still has the cohort: its loaders stay usable after `data.forget`, so that models
    are asked the same questions before and after.

    Args:
        data: An `ImageDataModule`, or one with the same loaders.
        cohort: Index of the samples to forget (f,), int64.
        validation: Whether to ask about the validation split too, which shadow models know.

    Raises:
        ValueError: There is no sample that was not trained on.
    """

    def __init__(self, data: Any, cohort: Tensor, *, validation: bool = False) -> None:
        self.cohort = cohort.sort().values.cpu()
        self.loaders: dict[str, Any] = {
            "forget": data.chosen_dataloader(self.cohort),
            "retain": data.fixed_train_dataloader(),
            "test": data.test_dataloader(),
        }
        if validation:
            self.loaders["validation"] = data.val_dataloader()
        missing = [name for name in ("test", "validation") if name in self.loaders and not len(self.loaders[name])]
        if missing:
            raise ValueError(
                f"there is no {missing[0]} sample to compare the cohort with: attacks need samples that were not "
                "trained on. Set data.val_fraction=0.1"
            )

    def answers(self, method: Method, parts: Iterable[str] | None = None) -> dict[str, AnswersOnSamples]:
        """Evaluate a method with the weights that it has; all ranks have to call this together.

        Args:
            method: The method, attached to a trainer. It is in evaluation mode meanwhile.
            parts: Which samples: "retain", "forget", "test", "validation"; None: all.

        Returns:
            Its answers by part, each sample once.
        """
        with torch.no_grad(), evaluation_mode(method), exactly(method.device, False):
            return {name: self._ask(method, name) for name in (self.loaders if parts is None else parts)}

    def ask(self, method: Method) -> Answers:
        """Evaluate a method on all samples; all ranks have to call this together.

        Args:
            method: The method, attached to a trainer, with the weights that it has.

        Returns:
            Its answers.
        """
        return Answers(**self.answers(method))

    def _ask(self, method: Method, name: str) -> AnswersOnSamples:
        outputs = Column(lambda batch: method(batch.input).double(), len(method.classes))
        columns = {"label": Column.labels(), "logits": outputs}
        linear = cast(LQF, method)  # of which nothing is used but trainer and device, which every method has
        _, index, rows = gather_columns(linear, self._batches(linear, name), columns)
        part = AnswersOnSamples(index.cpu(), rows["label"].cpu(), rows["logits"].cpu())
        _refuse_answers(part, name, self.cohort)
        return part

    def _batches(self, method: LQF, name: str) -> Iterator[Batch]:
        loader = self.loaders[name]
        for batch in track(loader, f"answers to {name} samples", total=len(loader)):
            if name == "retain":
                kept = ~torch.isin(batch.index.cpu(), self.cohort)
                batch = Batch(batch.input[kept], batch.target[kept], batch.index[kept])
            if len(batch.target):
                yield on_device(method, batch)


def collect_answers(method: Method, data: Any, cohort: Tensor, *, validation: bool = False) -> Answers:
    """Ask a model about cohort, retained and test samples; all ranks have to call this together.

    Args:
        method: The method, attached to a trainer, with the weights in question (see `with_weights`).
        data: An `ImageDataModule` that still has the cohort, or one with the same loaders.
        cohort: Index of the samples to forget (f,), int64.
        validation: Whether to ask about the validation split too, which shadow models know.

    Returns:
        Its answers, the same on every rank, each sample once. Refusals are those of `Questions`.
    """
    return Questions(data, cohort, validation=validation).ask(method)


def _refuse_answers(part: AnswersOnSamples, name: str, cohort: Tensor) -> None:
    if name == "forget" and not torch.equal(part.index, cohort):
        raise ValueError(
            f"{len(cohort)} samples of the cohort were asked about and {len(part.index)} came: the data module no "
            "longer has them. Ask before data.forget, or set cohort to samples that are left"
        )
    if not len(part.label):
        raise ValueError(f"there is no {name} sample to ask about. Set cohort to fewer samples")
    if not bool(torch.isfinite(part.logits).all()):
        raise ValueError(
            f"outputs on {name} samples are not finite: this model has diverged and cannot be read out. Set a smaller "
            "step or strength for the scrub that made it, or scrub=newton"
        )
