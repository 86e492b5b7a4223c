"""Better training sets, from the linear-quadratic problem of a run: subsets and weights with their report."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lqf_lightning.analysis.run_problem import RunProblem
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.information.reweight import Derivative, Objective, detrimental, extend, held_out_derivative, reweight
from lqf_lightning.information.summarize import Judged, RemovalOrder, Summary, summarize
from lqf_lightning.linear.weighting import HeldOutLoss
from lqf_lightning.progress import track

Task = Literal["summarize", "reweight", "extend", "detrimental"]
_OPTIONS = {
    "summarize": ("keep", "order", "step", "baselines"), "reweight": ("steps", "length"),
    "extend": ("count", "batch"), "detrimental": ("threshold", "share"),
}  # fmt: skip
_NOTHING = 1e-9  # a loss that nothing can lower
_PLACE = {name: f"{task}.{name}" for task, names in _OPTIONS.items() for name in names}  # in the configuration


@dataclass(frozen=True)
class Request:
    """What to curate, and how; see ``conf/curate.yaml``.

    Attributes:
        task: "summarize", "reweight", "extend" or "detrimental".
        keep: Share of the training samples that a summary keeps.
        order: In which samples leave a summary: "iterative", "one_shot" or "random".
        step: Share of what is left that leaves in each round of a summary.
        baselines: Other orders that are drawn beside it.
        by: Whose loss the weights lower: "validation" or "leave_one_out".
        loss: "squared" or "cross_entropy".
        steps: Most steps of reweighting.
        length: Root mean square of the change of the weights in a step.
        count: Most samples that are added.
        batch: Samples that are added in a round.
        threshold: Derivative from which a sample is detrimental; None means above 0.
        share: Instead, the share of the samples with the largest derivatives.
        seed: Decides a random order.

    Raises:
        ValueError: The task has another name, or an option is out of range.
    """

    task: Task
    keep: float = 0.5
    order: RemovalOrder = "iterative"
    step: float = 0.05
    baselines: tuple[RemovalOrder, ...] = ("random",)
    by: Objective = "leave_one_out"
    loss: HeldOutLoss = "squared"
    steps: int = 3
    length: float = 0.5
    count: int = 100
    batch: int = 10
    threshold: float | None = None
    share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds in (("task", Task), ("order", RemovalOrder), ("by", Objective), ("loss", HeldOutLoss)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"`{name}` must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}. Set "
                    f"{_PLACE.get(name, name)}={get_args(kinds)[0]}"
                )
        odd = [name for name in self.baselines if name not in get_args(RemovalOrder)]
        if odd:
            raise ValueError(
                f"`baselines` may hold {', '.join(get_args(RemovalOrder))}, got {odd}. Set summarize.baselines=[]"
            )
        for name, valid, example in (
            ("keep", 0 < self.keep < 1, 0.5), ("step", 0 < self.step < 1, 0.05), ("steps", self.steps >= 1, 3),
            ("length", self.length > 0, 0.5), ("count", self.count >= 1, 100), ("batch", self.batch >= 1, 10),
            ("share", self.share is None or 0 < self.share <= 1, 0.1),
        ):  # fmt: skip
            if not valid:
                raise ValueError(f"`{name}` is out of range, got {getattr(self, name)}. Set {_PLACE[name]}={example}")
        if self.threshold is not None and self.share is not None:
            raise ValueError(
                f"got threshold={self.threshold} and share={self.share}, but one decides. Set detrimental.share=null"
            )


@dataclass(frozen=True)
class Curation:
    """What a task has found.

    Attributes:
        tables: By file name without ending: tables of samples.
        report: Plain values.
        samples: One row per training sample: `index`, `path`, `class` and what was found, the column `value` first.
        curves: Accuracy or loss by number of samples or rounds, by name.
    """

    tables: dict[str, pd.DataFrame]
    report: dict[str, Any]
    samples: pd.DataFrame
    curves: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def curate_problem(run: RunProblem, manifest: Manifest, request: Request, core: Tensor | None = None) -> Curation:
    """Curate the training set of a run.

    Args:
        run: Its problem, with the pool for "extend".
        manifest: Of its samples.
        request: What to do.
        core: For "extend", which samples are in the training set already (n,), bool.

    Returns:
        Tables that `data.subset` and `data.weights` take, and a report. Refusals are those of `held_out_derivative`,
        and of "extend" without a pool.
    """
    samples = manifest.table.loc[run.table.index.tolist(), ["index", "path", "class"]].reset_index(drop=True)
    judged = judged_of(run)
    if request.task == "summarize":
        found = _summarize(run, samples, request, judged)
    elif request.task == "extend":
        found = _extend(run, samples, request, judged, core)
    else:
        found = _weigh(run, samples, request, judged)
    found.report.update(task=request.task, kernel=run.kernel.form, exact=run.exact, twin=run.twin, samples=len(samples))
    found.report.setdefault("ridge", run.problem.ridge)
    return found


def judged_of(run: RunProblem) -> Judged | None:
    """Take the validation samples of a run as those that decide.

    Args:
        run: Its problem.

    Returns:
        The samples, or None if there are none.
    """
    if run.validation is None or run.cross is None:
        return None
    target = run.method.target_scale * one_hot(run.validation.label, run.problem.outputs).to(run.problem.target)
    return Judged(run.cross, run.validation.initial, target)


def _summarize(run: RunProblem, samples: pd.DataFrame, request: Request, judged: Judged | None) -> Curation:
    def one(order: RemovalOrder) -> Summary:
        def watch(rounds: Iterable[int]) -> Iterable[int]:
            return track(list(rounds), f"summary, {order}")

        options: dict[str, Any] = {"order": order, "share": request.step, "seed": request.seed, "watch": watch}
        least = max(1, round(request.keep * len(samples)))
        return summarize(run.problem, run.kernel, judged, run.scales, least=least, **options)

    results = {order: one(order) for order in dict.fromkeys((request.order, *request.baselines))}
    chosen = results[request.order]
    kept = chosen.best(int(chosen.kept[-1]))
    subset = samples.iloc[kept.tolist()]
    ridge = run.problem.ridge
    return Curation(
        tables={"subset": subset[["index", "path"]]},
        report={
            "judged_by": "leave_one_out" if judged is None else "validation",
            "kept": len(kept),
            "kept_by_class": _counts(subset),
            "accuracy": {name: float(result.accuracy[-1]) for name, result in results.items()},
            "accuracy_of_all": float(chosen.accuracy[0]),
            "method_ridge_of_same_penalty": ridge / len(kept),
        },
        samples=samples.assign(value=chosen.score.tolist()),
        curves={n: ((r.kept / len(samples)).tolist(), r.accuracy.tolist()) for n, r in results.items()},
    )


def _weigh(run: RunProblem, samples: pd.DataFrame, request: Request, judged: Judged | None) -> Curation:
    derivative = _derivative(request, judged)
    if request.task == "detrimental":
        value = derivative(run.factor())
        _refuse_nothing([value.loss])
        worst = detrimental(value.gradient, threshold=request.threshold, share=request.share)
        table = samples.assign(value=value.gradient.tolist())
        _refuse_lost(samples, rest := samples.drop(index=worst.tolist()), "detrimental.share=0.1")
        return Curation(
            tables={"detrimental": table.iloc[worst.tolist()], "subset": rest[["index", "path"]]},
            report={"loss": value.loss, "detrimental": len(worst), "by_class": _counts(table.iloc[worst.tolist()])},
            samples=table,
        )
    result = reweight(run.problem, run.kernel, derivative, run.scales, steps=request.steps, length=request.length)
    table = samples.assign(weight=result.weight.tolist())
    _refuse_lost(samples, table[table["weight"] > 0], "reweight.length=0.1")
    return Curation(
        tables={"weights": table[["index", "path", "weight"]]},
        report={"losses": _refuse_nothing(result.losses), "steps_taken": len(result.losses) - 1,
                "zero_weights": int((result.weight == 0).sum()),
                "weight_by_class": {str(k): float(v) for k, v in table.groupby("class")["weight"].sum().items()}},
        samples=samples.assign(value=result.weight.tolist(), derivative=result.derivative.tolist()),
        curves={"loss": (list(range(len(result.losses))), result.losses)},
    )  # fmt: skip


def _extend(
    run: RunProblem, samples: pd.DataFrame, request: Request, judged: Judged | None, core: Tensor | None
) -> Curation:
    if core is None or not bool(core.any()) or bool(core.all()):
        raise ValueError(
            f"there is no pool: the run trains on {len(samples)} of {len(samples)} samples. Extend a run with "
            "data.subset, data.shots or data.subset_ratio below 1"
        )
    inside, pool = core.nonzero().flatten(), (~core).nonzero().flatten()
    ridge = run.problem.ridge * len(inside) / len(samples)  # mu times the samples that the run has
    problem, derivative = run.problem.with_(ridge=ridge), _derivative(request, judged, core.double())
    options = {"count": request.count, "batch": request.batch}
    result = extend(problem, run.kernel, derivative, pool, run.scales, **options)
    together = torch.cat([inside.cpu(), result.added]).sort().values
    rounds = [len(inside) + min(k * request.batch, len(result.added)) for k in range(len(result.losses))]
    added = samples.iloc[result.added.tolist()]
    return Curation(
        tables={"subset": samples.iloc[together.tolist()][["index", "path"]], "added": added},
        report={"core": len(inside), "pool": len(pool), "added": len(added), "added_by_class": _counts(added),
                "losses": _refuse_nothing(result.losses), "ridge": ridge},
        samples=samples.assign(value=result.derivative.tolist()),
        curves={"loss": ([float(size) for size in rounds], result.losses)},
    )  # fmt: skip


def _refuse_nothing(losses: list[float]) -> list[float]:
    if losses[0] < _NOTHING:
        raise ValueError(
            f"the held-out loss is {losses[0]:.2g}, nothing but rounding, and so is its derivative: held-out samples "
            "are right at any confidence. Set loss=squared"
        )
    return losses


def _refuse_lost(samples: pd.DataFrame, left: pd.DataFrame, advice: str) -> None:
    lost = sorted(set(samples["class"]) - set(left["class"]))
    if lost:
        raise ValueError(f"no sample of {', '.join(lost)} would be left, and no run takes that. Set {advice}")


def _derivative(request: Request, judged: Judged | None, judge: Tensor | None = None) -> Derivative:
    return held_out_derivative(request.by, request.loss, judged=judged, judge=judge)


def _counts(rows: pd.DataFrame) -> dict[str, int]:
    return {str(name): int(number) for name, number in rows["class"].value_counts().sort_index().items()}
