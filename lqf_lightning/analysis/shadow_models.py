"""Models of random halves of the training set, solved from one kernel: what the likelihood-ratio attack learns from."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lqf_lightning.analysis.run_problem import RunProblem
from lqf_lightning.linear import DualFactor, Kernel, current_reducer
from lqf_lightning.linear.restrict import restrict_kernel, restrict_problem
from lqf_lightning.progress import track


@dataclass(frozen=True)
class ShadowModels:
    """Outputs of shadow models, the same on every rank and in the memory of the CPU.

    Attributes:
        member: Whether a model was trained on a sample of the cohort (T, f), bool.
        cohort: Outputs on the cohort (T, f, C).
        others: Outputs on validation samples (T, m, C).
        index: Index of the cohort's samples (f,), ascending.
        other_index: Index of the validation samples (m,), ascending.
        exact: Whether the kernel behind them is that of the model itself, and no surrogate.
    """

    member: Tensor
    cohort: Tensor
    others: Tensor
    index: Tensor
    other_index: Tensor
    exact: bool


def shadow_models(
    run: RunProblem, positions: Tensor, count: int = 64, *, seed: int = 0, ridge: Literal["mean", "sum"] = "mean"
) -> ShadowModels:
    """Solve the problem of a run on random halves of its training set; all ranks have to call this together.

    Every training sample, of the cohort or not, is in exactly half of the halves, drawn by lot (Carlini et al.,
    Membership Inference Attacks From First Principles, 2022, section V-D). A model takes one factorization of a quarter
    of the kernel and no pass through the network; ranks share the models out.

    Args:
        run: The problem of the run, with its validation samples.
        positions: Rows of the cohort's samples in `run.table` (f,), int64.
        count: Number T of models, even, at least 6.
        seed: Of the lots, the same on every rank.
        ridge: "mean" keeps `method.ridge`, so that lambda shrinks with the set as it does in training; "sum" keeps
            lambda.

    Returns:
        Their outputs. Refused are numbers of models that are odd or below 6, positions that are no row, runs without
        validation samples, and what `DualFactor` refuses.
    """
    _refuse(run, positions, count)
    positions, member = positions.cpu().sort().values, _halves(run.problem.samples, count, seed)
    known, reducer = _Asked.of(run, positions), current_reducer()
    outputs = known.initial.new_zeros(count, *known.initial.shape)
    for model in track(range(reducer.rank, count, reducer.world_size), "shadow models"):
        rows = member[model].nonzero().squeeze(1)
        share = len(rows) / run.problem.samples if ridge == "mean" else 1.0
        outputs[model] = known.solve(run, rows, share)
    cohort, others = torch.split(reducer.sum_(outputs).cpu(), [len(positions), known.others], 1)
    index, other_index = run.table.index.cpu()[positions], known.other_index
    return ShadowModels(member[:, positions], cohort, others, index, other_index, run.exact)


@dataclass(frozen=True)
class _Asked:
    # Kernels of cohort, then validation samples, with all training samples; their outputs before training.
    among: Kernel
    kernel: Kernel
    initial: Tensor
    other_index: Tensor

    @classmethod
    def of(cls, run: RunProblem, positions: Tensor) -> "_Asked":
        if run.validation is None or run.cross is None:
            raise ValueError(
                "shadow models are asked about validation samples, and there are none. Set data.val_fraction=0.1"
            )
        outputs, form = run.kernel.outputs, run.kernel.form
        among = Kernel({"all": run.kernel.total(run.scales)}, outputs, form)
        cohort = restrict_kernel(among, rows=positions).groups["all"]
        kernel = Kernel({"all": torch.cat([cohort, run.cross.total(run.scales)], 1)}, outputs, form)
        start = run.problem.initial.double()[positions.to(run.problem.initial.device)]
        initial = torch.cat([start, run.validation.initial.to(start)])
        return cls(among, kernel, initial, run.validation.index.cpu())

    @property
    def others(self) -> int:
        return len(self.other_index)

    def solve(self, run: RunProblem, rows: Tensor, share: float) -> Tensor:
        part = restrict_problem(run.problem, rows.to(self.initial.device)).with_(ridge=run.problem.ridge * share)
        factor = DualFactor(part, restrict_kernel(self.among, rows=rows, columns=rows))
        return factor.predict(restrict_kernel(self.kernel, columns=rows), self.initial)


def _refuse(run: RunProblem, positions: Tensor, count: int) -> None:
    samples = run.problem.samples
    if count < 6 or count % 2:
        raise ValueError(f"an even number of shadow models, at least 6, is needed, got {count}. Set shadows=64")
    if samples < 4 or not len(positions) or int(positions.min()) < 0 or int(positions.max()) >= samples:
        raise ValueError(f"the cohort must be rows 0 to {samples - 1} of at least 4, got {positions.tolist()[:5]}")


def _halves(samples: int, count: int, seed: int) -> Tensor:
    # Every sample in exactly half of the models; a model that gets none of very few samples refuses to be solved.
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(count, samples, generator=draw).argsort(0)
    return order < count // 2
