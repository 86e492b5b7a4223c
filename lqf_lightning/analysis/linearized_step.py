"""The step of the NTK scrub on a run: from its samples and its start to a movement of the weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lqf_lightning.analysis.cohort_split import CohortSplit
from lqf_lightning.analysis.network_scrub import NetworkScrub
from lqf_lightning.analysis.run_problem import LIMIT, RunProblem, problem_of_run
from lqf_lightning.backbones import Backbone
from lqf_lightning.forgetting.ntk_scrub import NTKMovement, ntk_movement, trapezium_scale
from lqf_lightning.linear import mean_of_ridge, ridge_of_mean
from lqf_lightning.methods import Finetune
from lqf_lightning.methods.solvers.sweep import PullSweep, PushSweep
from lqf_lightning.methods.solvers.training_table import training_batches

Tensors = dict[str, Tensor]
_PUSH, _PULL = 3, 2  # evaluations of the network per sample, a pull beside one for all of them


def linearized_step(
    split: CohortSplit, method: Finetune, start: Backbone, options: NetworkScrub, weights: Tensors
) -> tuple[Tensors, float]:
    r"""How far the training of the network's expansion at its start would have moved without the cohort.

    The full kernel of all training samples is assembled at the *initial* weights, where the expansion is that of the
    run (the papers' code takes it at the trained ones), with frozen statistics of batch normalization. For the squared
    loss the problem is that of the run; for cross-entropy the targets are :math:`f_0 - (\mathrm{softmax}(f_0) - e_y)`,
    that is, the residual is the gradient of the loss at the start and its Hessian is replaced by the identity, as in
    the papers' code. Every trained weight is penalized alike, biases included.

    Args:
        split: What is forgotten and what stays; the data module still holds everything.
        method: The method at its trained weights.
        start: The network before training.
        options: Those of the scrub.
        weights: The trained weights by parameter name.

    Returns:
        The movement by parameter name, and the work in passes of linearized training over the retained samples, the
        products of the kernel not counted.

    Raises:
        ValueError: There are too many samples for the kernel, or the penalty is too small for double precision.
    """  # noqa: DOC502 - raised by the functions below
    _refuse_size(split, method)
    ridge = _ridge(method, options)
    run = problem_of_run(
        method, form="full", memory_gib=options.memory_gib, validation=False, start=start, settle=ridge is None,
        intercept=False,
    )  # fmt: skip
    samples, outputs = run.table.initial.shape
    evaluations = 2 + 2 * outputs  # the outputs at the start; then once more, and back for every output
    mu = mean_of_ridge(run.problem.ridge, samples) if ridge is None else ridge
    run = replace(run, problem=run.problem.with_(ridge=ridge_of_mean(mu, samples), target=_target(run, method)))
    known = dict(start.model.named_parameters())
    initial = {name: known[name].detach().to(weight) for name, weight in weights.items()}
    if options.center == "zero":
        run = replace(run, problem=run.problem.with_(initial=run.problem.initial - _push(run, initial)))
        evaluations += _PUSH
    moved = _solve(run, split, mu)
    sides = [moved.coefficients, moved.retained] if options.trapezium else [moved.coefficients]
    pulled = _pull(run, sides)
    evaluations += 1 + _PULL * len(sides)
    step = pulled[0]
    if options.trapezium:
        origin = initial if options.center == "start" else {name: 0 * weight for name, weight in weights.items()}
        step = _lengthened(step, {name: weight - origin[name] - pulled[1][name] for name, weight in weights.items()})
    return step, evaluations * samples / 5 / len(split.retained)


def run_decay(method: Finetune) -> float:
    r"""The penalty beside the mean loss that a run has had, :math:`\frac{\mu}{2} \lVert w \rVert^2`.

    Args:
        method: The method.

    Returns:
        mu; 0 where there is none, or where the optimizer shrinks weights without a penalty (AdamW).
    """
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = method.make_optimizer([{"params": [parameter], "name": "any"}])
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam):
        return 0.0
    group: dict[str, Any] = optimizer.param_groups[0]
    return 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])


def _ridge(method: Finetune, options: NetworkScrub) -> float | None:
    if isinstance(options.ridge, float | int):
        return float(options.ridge)
    decay = run_decay(method) if options.ridge is None else 0.0
    return decay if decay > 0 else None


def _target(run: RunProblem, method: Finetune) -> Tensor:
    if method.hparams["loss"] == "squared":
        return run.problem.target
    initial = run.table.initial.double()
    return initial - initial.softmax(1) + one_hot(run.table.label, initial.shape[1]).to(initial)


def _solve(run: RunProblem, split: CohortSplit, mu: float) -> NTKMovement:
    forgotten = torch.searchsorted(run.table.index, split.forgotten.to(run.table.index))
    ridge = ridge_of_mean(mu, len(run.table.index) - len(forgotten))
    try:
        return ntk_movement(run.problem, run.kernel, forgotten, retained_ridge=ridge, scales=run.scales)
    except ValueError as error:
        raise ValueError(
            f"the linearized run cannot be solved at the penalty {mu:.3g}. Set ++callbacks.scrub.options.ridge=auto"
        ) from error


def _push(run: RunProblem, direction: Tensors) -> Tensor:
    sweep = PushSweep(run.method.linearized, direction)
    for batch in training_batches(run.method, "ntk: initial weights"):
        sweep.take(batch.input)
    return run.table.shard.spread(sweep.result(run.problem.outputs))


def _lengthened(step: Tensors, leg: Tensors) -> Tensors:
    scale = trapezium_scale(step, leg)
    return {name: scale * entry for name, entry in step.items()}


def _pull(run: RunProblem, sides: list[Tensor]) -> list[Tensors]:
    shard = run.table.shard
    sweep = PullSweep(run.method.linearized, *(shard.own(side) for side in sides))
    for batch in training_batches(run.method, "ntk: movement"):
        sweep.take(batch.input)
    return [{name: shard.reducer.sum_(entry) for name, entry in pulled.items()} for pulled in sweep.result()]


def _refuse_size(split: CohortSplit, method: Finetune) -> None:
    samples, outputs = len(split.forgotten) + len(split.retained), len(method.classes)
    if samples * outputs > LIMIT:
        raise ValueError(
            f"ntk takes the full kernel of all training samples, of at most {LIMIT} samples times classes; got "
            f"{samples} x {outputs} = {samples * outputs}. Set callbacks.scrub.name=fisher"
        )
