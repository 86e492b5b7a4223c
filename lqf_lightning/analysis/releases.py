"""What outsiders see of a noisy model: its answers, for many draws of the noise."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lqf_lightning.analysis.answers_of_model import Questions
from lqf_lightning.analysis.with_weights import with_weights
from lqf_lightning.methods import Method


def releases(
    method: Method,
    questions: Questions,
    weights: Mapping[str, Tensor],
    draw: Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]],
    seeds: Iterable[int],
) -> Tensor:
    """Answers on the cohort and on test samples, one row per draw of the noise: what `release_test` compares.

    All ranks have to call this together. Take other seeds for each of two models: with equal noise, releases would be
    compared without it.

    Args:
        method: The method, attached to a trainer; it has its own weights back at the end.
        questions: The samples, of which those of the cohort and of the test set are answered.
        weights: The weights before noise, by `method.trained()` name.
        draw: Noise for these weights and a seed, the same on every rank, as of `Noise.draw`.
        seeds: One per release.

    Returns:
        Outputs (releases, samples times outputs), the same on every rank.
    """
    rows = []
    for seed in seeds:
        noise = draw(weights, seed)
        with with_weights(method, {name: weight + noise[name] for name, weight in weights.items()}):
            answers = questions.answers(method, parts=("forget", "test"))
        rows.append(torch.cat([part.logits.flatten() for part in answers.values()]))
    return torch.stack(rows)
