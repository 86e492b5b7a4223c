"""How much weights and answers hold about cohorts of training samples, while a linear model is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.analysis.cohort_optima import NOTHING, CohortOptimum, cohort_optima, seconds_of_sweep
from lqf_lightning.analysis.query_set import QuerySet, gather_images, spread_evenly
from lqf_lightning.analysis.run_problem import problem_of_run
from lqf_lightning.data import Batch
from lqf_lightning.linear.jacobian import push_batch
from lqf_lightning.linear.metric import dot
from lqf_lightning.methods import LQF
from lqf_lightning.methods.solvers.sample_columns import Column, gather_columns, output_at_start
from lqf_lightning.methods.solvers.training_table import fixed_batches

Numbers = dict[str, float | None]


@dataclass(frozen=True)
class CohortBounds:
    """What is needed to say, at any weights, how much they tell of each cohort.

    Attributes:
        method: The method.
        optima: Where training ends without each cohort, `NOTHING` first.
        validation: Queries from the validation set; None if there is none.
        own: Queries from each cohort itself.
        sigma: Deviation of the noise that every released weight carries.
        costs: What forgetting each cohort costs, see `cohort_costs`.
        seconds: What a sweep over the training samples takes.
    """

    method: LQF
    optima: dict[str, CohortOptimum]
    validation: QuerySet | None
    own: dict[str, QuerySet]
    sigma: float
    costs: dict[str, Numbers]
    seconds: float

    def now(self) -> dict[str, Numbers]:
        r"""Measure the present weights; every rank finds the same, without speaking to the others.

        Let w be all trained numbers, intercept included, w' those of the optimum without the cohort, both released
        with noise of deviation sigma. All are divergences from a model that has not seen the cohort:

        * ``weights_nats``: :math:`|w - w'|^2 / 2 \sigma^2`, which bounds what anyone can find out about the cohort
          from the weights; ``intercept_nats`` is the part of the intercept. Before training has converged most of it
          may be what is missing yet of the optimum: that of `NOTHING`, from the optimum on all samples, tells.
        * ``least_nats``: :math:`\min_\tau |w - \tau w'|^2 / 2 \sigma^2` over :math:`0 \le \tau \le 1`, against a model
          without the cohort that has stopped early; 0 before training.
        * ``outputs_nats`` and ``cohort_outputs_nats``: the part of ``weights_nats`` that is in the answers to all
          queries from the validation set, and from the cohort itself (None where there are none).

        Returns:
            Numbers by name of the cohort.
        """
        with torch.inference_mode(False), torch.no_grad():
            deltas = {name: delta.detach().clone() for name, delta in self.method.linearized.deltas.items()}
            return self._at(deltas)

    def rough(self) -> dict[str, float]:
        """Find the cohorts whose optimum is not known well enough to say how far forgetting them moves the weights.

        Returns:
            Proven distance from the optimum by name of the cohort, where it exceeds the movement.
        """
        whole = self.optima[NOTHING]
        moved = {
            name: {key: entry - found.weights[key] for key, entry in whole.weights.items()}
            for name, found in self.optima.items()
            if name != NOTHING
        }
        bounds = {
            name: max(self.optima[name].certificate.distance_bound, whole.certificate.distance_bound) for name in moved
        }
        return {name: bounds[name] for name, change in moved.items() if bounds[name] ** 2 > dot(change, change)}

    def at_optimum(self) -> dict[str, Numbers]:
        """What a model will hold that is trained to the optimum, known before the first step.

        Returns:
            As of `now`.
        """
        with torch.inference_mode(False), torch.no_grad():
            return self._at(self.optima[NOTHING].weights)

    def _at(self, weights: dict[str, Tensor]) -> dict[str, Numbers]:
        changes = {
            name: {key: entry - optimum.weights[key] for key, entry in weights.items()}
            for name, optimum in self.optima.items()
        }
        answers = {} if self.validation is None else self.validation.information(self.method, changes, self.sigma)
        found = {}
        for name, change in changes.items():
            numbers = self._in_weights(change, self.optima[name].weights)
            whole, queries = numbers["weights_nats"], self.own.get(name)
            own = {} if queries is None else queries.information(self.method, {name: change}, self.sigma)
            # No query tells more than the weights do; rounding might.
            numbers["outputs_nats"] = min(answers[name], whole) if name in answers else None
            numbers["cohort_outputs_nats"] = min(own[name], whole) if own else None
            found[name] = numbers
        return found

    def _in_weights(self, change: dict[str, Tensor], optimum: dict[str, Tensor]) -> dict[str, Any]:
        square, along, length = dot(change, change), dot(change, optimum), dot(optimum, optimum)
        back = min(1.0, max(0.0, -along / length)) if length > 0 else 0.0  # 1 - tau
        intercept = self.method.intercept_name
        part = 0.0 if intercept is None else float(change[intercept].double().square().sum())
        scale = 0.5 / self.sigma**2
        least = max(0.0, square + back * (2 * along + back * length))
        return {"weights_nats": scale * square, "intercept_nats": scale * part, "least_nats": scale * least}


def cohort_bounds(
    method: LQF,
    cohorts: Mapping[str, Tensor],
    *,
    sigma: float,
    queries: int,
    tolerance: float,
    memory_gib: float = 4.0,
    chunk_size: int | None = None,
    folder: str | Path | None = None,
) -> CohortBounds:
    """Prepare the bounds of a run; all ranks have to call this together.

    The full kernel is assembled, and from it follow the optima and what the scrubs will take. Random numbers of the
    training are not touched.

    Args:
        method: The method, attached to a trainer with an `ImageDataModule`.
        cohorts: Manifest index of the members by name of the cohort (s,).
        sigma: Deviation of the noise that every released weight carries.
        queries: Images of a set of queries; fewer if the model has many outputs.
        tolerance: Relative gradient at which the scrubs stop that are foretold.
        memory_gib: Memory for what the kernel is assembled from, in GiB.
        chunk_size: Images per pass of this rank; None: those of an evaluation batch.
        folder: Keeps finished parts of the kernel, so that an interrupted assembly goes on.

    Returns:
        The bounds.
    """
    run = problem_of_run(
        method, form="full", memory_gib=memory_gib, chunk_size=chunk_size, folder=folder, validation=False
    )
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        rows = {name: torch.searchsorted(run.table.index, index.to(run.table.index)) for name, index in cohorts.items()}
        optima = cohort_optima(run, rows, tolerance=tolerance)
        seconds = seconds_of_sweep(method, run.table, optima[NOTHING].weights)
        own = {name: run.table.index[positions] for name, positions in rows.items()}
        data = method.solver.data_module()
        asked = {name: spread_evenly(index, queries, len(method.classes)) for name, index in own.items()}
        sets = _query_sets(method, data.fixed_train_dataloader(), asked)
        validation, costs = None, {name: dict[str, float | None]() for name in optima}
        if len(loader := data.val_dataloader()):
            index, costs = cohort_costs(method, loader, optima)
            chosen = {NOTHING: spread_evenly(index, queries, len(method.classes))}
            validation = _query_sets(method, loader, chosen)[NOTHING]
    return CohortBounds(method, optima, validation, sets, sigma, costs, seconds)


def cohort_costs(method: LQF, loader: Any, optima: Mapping[str, CohortOptimum]) -> tuple[Tensor, dict[str, Numbers]]:
    """What forgetting costs on the validation set, between the optima with and without each cohort.

    Args:
        method: The method.
        loader: Validation samples of this rank.
        optima: Optima by name, that of `NOTHING` among them.

    Returns:
        Index of the validation samples (m,), and by name ``accuracy``, ``accuracy_cost`` (how much lower it is than
        with all samples), ``loss`` and ``loss_cost`` (how much higher it is).
    """
    directions, outputs = [optimum.weights for optimum in optima.values()], len(method.classes)

    def answers(batch: Batch) -> Tensor:
        initial = output_at_start(method, batch).double()
        moved = push_batch(method.linearized, batch.input, directions)
        return torch.cat([initial + part.double() for part in moved], 1)

    columns = {"label": Column.labels(), "answers": Column(answers, outputs * len(optima))}
    _, index, rows = gather_columns(method, fixed_batches(method, loader, "validation without cohorts"), columns)
    found: dict[str, Numbers] = {}
    for name, logits in zip(optima, torch.split(rows["answers"], outputs, 1), strict=True):
        accuracy = float((logits.argmax(1) == rows["label"]).double().mean())
        found[name] = {"accuracy": accuracy, "loss": float(method.loss(logits, rows["label"]))}
    best = dict(found[NOTHING])
    for numbers in found.values():
        for name, sign in (("accuracy", -1.0), ("loss", 1.0)):
            numbers[f"{name}_cost"] = sign * ((numbers[name] or 0.0) - (best[name] or 0.0)) + 0.0
    return index, found


def _query_sets(method: LQF, loader: Any, wanted: Mapping[str, Tensor]) -> dict[str, QuerySet]:
    # One pass over the images for all sets.
    if not wanted:
        return {}
    every = torch.unique(torch.cat(list(wanted.values())))
    images = gather_images(every, fixed_batches(method, loader, "images of queries"))
    found = {}
    for name, index in wanted.items():
        found[name] = QuerySet.of(method, images[torch.searchsorted(every, index)], index)
    return found
