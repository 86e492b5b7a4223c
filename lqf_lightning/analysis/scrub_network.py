"""Remove a cohort from a fine-tuned network, without a proof: the approximate scrubs and the usual baselines."""

import copy
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lqf_lightning.analysis.climb_baseline import climb_on
from lqf_lightning.analysis.cohort_split import CohortSplit, SampleInputs
from lqf_lightning.analysis.descend_baselines import Descent, train_on
from lqf_lightning.analysis.hide_class import hide_class
from lqf_lightning.analysis.linearized_step import linearized_step
from lqf_lightning.analysis.network_scrub import NetworkScrub
from lqf_lightning.analysis.scrubbed import Scrubbed
from lqf_lightning.analysis.secret_seed import secret_seed
from lqf_lightning.backbones import Backbone
from lqf_lightning.congruence import diagonal_fisher, reestimate_batch_norm
from lqf_lightning.forgetting.fisher_scrub import clear_rows, fisher_variance
from lqf_lightning.forgetting.noise import DiagonalNoise
from lqf_lightning.linear import current_reducer
from lqf_lightning.methods import Finetune

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]
_STEP = 5  # evaluations of the network per sample in a unit of work
_REESTIMATES = 2  # passes


@dataclass
class _Work:
    """New weights, and what they have cost.

    Attributes:
        weights: By parameter name.
        passes: Work in passes of linearized training over the retained samples.
        steps: Taken by an optimizer, or 1.
        curve: By epoch or step.
    """

    weights: Tensors
    passes: float = 0.0
    steps: int = 1
    curve: list[dict[str, float]] = field(default_factory=list)


def scrub_network(method: Finetune, start: Backbone, cohort: Tensor, **options: Any) -> Scrubbed:
    """Compute weights for a fine-tuned network that is to forget some of its training samples.

    Nothing is certified: for a nonlinear network none of these is known to remove anything in particular, and what
    they are worth shows in comparison with a network that is trained without the samples. Noise is part of the fisher
    scrub, and of ntk where its strength is given; it is in the weights that come back, the same on every rank. Images
    come as they are evaluated, normalization layers keep their statistics and dropout is off. All computations are in
    the precision of the weights. An averaged teacher of the run is not scrubbed.

    Args:
        method: The method at its trained weights, attached to a trainer whose data module still holds all training
            samples; it is left as it is. All ranks have to call this together.
        start: The network before training.
        cohort: Manifest index of the samples to forget.
        **options: Those of `NetworkScrub`.

    Returns:
        New weights by the names of `Method.trained`, the same on every rank; with `reestimate`, new statistics too.

    Raises:
        ValueError: The method is another one, the cohort is none of its training samples, or the options do not go
            with them.
    """
    began, chosen = time.monotonic(), NetworkScrub(**options)
    if type(method) is not Finetune:
        raise ValueError(
            f"{chosen.name} scrubs networks that are trained by labels alone, method=finetune, got "
            f"{type(method).__name__}. Set callbacks.scrub.name=newton for method=lqf; other methods have no scrub"
        )
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        split = CohortSplit.of(method, cohort)
        _tell(method, chosen)
        work = _scrub(split, method, start, chosen)
        reducer = current_reducer()
        weights = {name: reducer.broadcast_(weight.detach().clone()) for name, weight in work.weights.items()}
        buffers, passes = _statistics(split, method, weights, work.passes) if chosen.reestimate else (None, work.passes)
    seconds = time.monotonic() - began
    return Scrubbed(weights, None, None, chosen.name, work.steps, passes, seconds, work.curve, buffers)


def _scrub(split: CohortSplit, method: Finetune, start: Backbone, options: NetworkScrub) -> _Work:
    weights = {name: parameter.detach().clone() for name, parameter in method.trained().items()}
    if options.name == "fisher":
        return _noisy(split, method, options, _Work(weights))
    if options.name == "ntk":
        step, passes = linearized_step(split, method, start, options, weights)
        work = _Work({name: weight + step[name].to(weight) for name, weight in weights.items()}, passes)
        return _noisy(split, method, options, work) if options.noise > 0 else work
    if options.name == "hide_class":
        _refuse_parts_of_classes(split, method)
        return _Work(hide_class(weights, method.backbone.head, split.classes, logit=options.hidden_logit))
    if options.name == "gradient_ascent":
        return _work(climb_on(split, method, options, weights))
    return _work(train_on(split, method, options, weights, wrong_labels=options.name == "random_labels"))


def _work(descent: Descent) -> _Work:
    return _Work(descent.weights, descent.passes, descent.steps, descent.curve)


def _noisy(split: CohortSplit, method: Finetune, options: NetworkScrub, work: _Work) -> _Work:
    # The Fisher information is that of the weights which the noise is added to.
    inputs = SampleInputs(split.batches(split.retained))
    network = _network(method, work.weights)
    information = diagonal_fisher(network, inputs, draws=options.draws, seed=options.seed, reducer=current_reducer())
    head = [name for name in work.weights if name in (f"{method.backbone.head}.{part}" for part in ("weight", "bias"))]
    variance = fisher_variance(
        {name: information[name] for name in work.weights}, strength=options.noise, cap=options.cap, head=head,
        head_cap=options.head_cap, factor=options.factor, by_filter=options.by_filter,
    )  # fmt: skip
    cleared, variance = clear_rows(work.weights, variance, head, split.classes, options.class_variance)
    drawn = DiagonalNoise(variance).draw(cleared, secret_seed(options.noise_seed, method.device))
    evaluations = 2 + 2 * (options.draws or len(method.classes))  # twice forward, and back for every label
    noisy = {name: weight + drawn[name] for name, weight in cleared.items()}
    return _Work(noisy, work.passes + evaluations / _STEP, work.steps, work.curve)


def _statistics(split: CohortSplit, method: Finetune, weights: Tensors, passes: float) -> tuple[Tensors, float]:
    network = _network(method, weights)
    inputs = SampleInputs(split.batches(split.retained))
    names = reestimate_batch_norm(network, inputs, passes=_REESTIMATES, reducer=current_reducer())
    known = dict(network.named_buffers())
    own = [f"{name}." if name else "" for name in names]
    parts = ("running_mean", "running_var", "num_batches_tracked")
    buffers = {f"{name}{part}": known[f"{name}{part}"] for name in own for part in parts if f"{name}{part}" in known}
    return buffers, passes + _REESTIMATES / _STEP


def _network(method: Finetune, weights: Tensors) -> nn.Module:
    network = copy.deepcopy(method.model)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return network


def _refuse_parts_of_classes(split: CohortSplit, method: Finetune) -> None:
    if not split.classes or not split.pure:
        whole = [method.classes[position] for position in split.classes]
        raise ValueError(
            f"hide_class forgets whole classes and nothing else; of the {len(split.forgotten)} samples to forget, "
            f"those of the classes {whole} are all there are, and {'there are others' if whole else 'no class is'}. "
            f"Set cohort={{class: {method.classes[0]}}}, or callbacks.scrub.name=ntk"
        )


def _tell(method: Finetune, options: NetworkScrub) -> None:
    layers = [m for m in method.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if layers and method.batch_norm == "train" and not options.reestimate:
        log.warning(
            "the statistics of %d batch normalizations are from training and still hold the forgotten samples. Set "
            "++callbacks.scrub.options.reestimate=true", len(layers),
        )  # fmt: skip
    if method.averaged_teacher is not None:
        log.warning("the averaged teacher of the run still holds the forgotten samples: it is not scrubbed")
