"""The averages' part of a comparison: measured on validation images, chosen there, reported once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lqf_lightning.comparison.average_checkpoint import confirm_average, write_average
from lqf_lightning.comparison.average_choice import (
    AveragePoint,
    choose_average,
    least_increase,
    measure_averages,
    point_of,
)
from lqf_lightning.comparison.flips import Comparison, compare_answers, paired_difference, summarize
from lqf_lightning.comparison.inputs import Side, networks_of
from lqf_lightning.comparison.predictions import predict
from lqf_lightning.comparison.weight_averages import WeightAverages
from lqf_lightning.data import ImageDataModule
from lqf_lightning.teachers import FrozenTeacher


@dataclass(frozen=True)
class Study:
    """What averages are measured with.

    Attributes:
        config: The composed configuration.
        old: The old model.
        new: The new model.
        data_config: Configuration of the data, under `data`.
        data: The data module, set up.
        comparisons: Old beside new, on the split of the report and on "val".
        device: Where to compute.
    """

    config: DictConfig
    old: Side
    new: Side
    data_config: DictConfig
    data: ImageDataModule
    comparisons: Mapping[str, Comparison]
    device: torch.device

    def run(self, kinds: Sequence[str]) -> dict[str, Any]:
        """Measure averages on validation images, choose one, compare it with the new model, and write it.

        Args:
            kinds: How the weights are averaged.

        Returns:
            Plain values.
        """
        averages = self._averages()

        def measure(kind: str, share: float) -> Comparison:
            return self._answer(averages.teacher(kind, share), "val")

        points = measure_averages(kinds, self.config.shares, measure)
        new = point_of("new", 0.0, self.comparisons["val"])
        chosen = choose_average(points, new, self.config.max_error_increase)
        found = {
            "kinds": list(kinds),
            "reason": "",
            "batch_norm": "reestimate" if averages.reestimates else "average",
            "max_error_increase": float(self.config.max_error_increase),
            "least_increase": least_increase(points, new),
            "validation": self._validation(points, new, averages),
            "chosen": asdict(chosen) if chosen else None,
        }
        return found | (self._report(averages.teacher(chosen.kind, chosen.share), chosen) if chosen else {})

    def _averages(self) -> WeightAverages:
        options = {name: self.config[name] for name in ("batch_norm", "batch_norm_samples", "fisher_samples", "seed")}
        old, new = (networks_of(side) for side in (self.old, self.new))
        # The average is written in the place of the first checkpoint, whose network comes first, too.
        return WeightAverages(old[0], new, new[0].classes, self.data, self.device, **options)

    def _answer(self, teacher: FrozenTeacher, split: str) -> Comparison:
        (answers,) = predict([teacher], self.data, [split], self.device)
        return compare_answers(self.data.manifest.rows(split), self.comparisons[split].old, answers)

    def _validation(
        self, points: Sequence[AveragePoint], new: AveragePoint, averages: WeightAverages
    ) -> dict[str, Any]:
        comparison = self.comparisons["val"]
        alone = None  # what the statistics do without any averaging, which is not to be credited to it
        if averages.reestimates and averages.single:
            alone = asdict(point_of("new", 0.0, self._answer(averages.teacher("bcwi", 0.0, ends=True), "val")))
        return {
            "new_reestimated": alone,
            "number": len(comparison.rows),
            "old_error": float((~comparison.old_right[comparison.known]).double().mean()),
            "new": asdict(new),
            "points": [asdict(point) for point in points],
        }

    def _report(self, teacher: FrozenTeacher, chosen: AveragePoint) -> dict[str, Any]:
        folder, split = Path(self.config.paths.output_dir), self.config.split
        result = self._answer(teacher, split)
        result.new.write(folder / "average_predictions.parquet")
        origin: dict[str, Any] = {"kind": chosen.kind, "share": chosen.share}
        origin |= {side.role: side.model.fingerprint for side in (self.old, self.new)}
        written = write_average(
            folder / "average", teacher, self.new.checkpoints[0], self.data_config, self.data, origin
        )
        bootstrap = bootstrap_options(self.config)
        return {
            "result": summarize(result, **bootstrap),
            "difference": paired_difference(self.comparisons[split], result, **bootstrap),
            "checkpoint": str(written),
            "fingerprint": confirm_average(written, teacher).fingerprint,  # as others will see it
        }


def bootstrap_options(config: DictConfig) -> dict[str, Any]:
    """Options of the intervals.

    Args:
        config: The composed configuration.

    Returns:
        Arguments of `flip_intervals`.
    """
    return {"level": config.level, "resamples": config.resamples, "seed": config.seed}
