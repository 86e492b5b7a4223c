"""How much a model's predictions depend on each of its weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.linear.gauss_newton_diagonal import sum_squared_jacobian
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.signs import sample_signs

_BITS = 48  # digits of the random numbers that choose labels


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    draws: int | None = None,
    normalize: bool = False,
    seed: int = 0,
    chunk: int = 8,
    reducer: Reducer | None = None,
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information of a classifier in evaluation mode.

    .. math:: F = \frac1N \sum_i \mathrm{E}_{y \sim p(\cdot | x_i)} \left[ (\nabla_\theta \log p(y | x_i))^2 \right]

    elementwise. Labels are the model's own: those of the data would give the empirical Fisher, another quantity, which
    vanishes where the model is right and sure.

    Args:
        model: Images (B, ...) -> logits (B, C); its own modes come back afterwards.
        batches: Images of this process, without labels.
        draws: None: the expectation itself, with one backward evaluation for each class of each sample. A number:
            labels drawn that many times per sample, unbiased. What is drawn belongs to a sample's content and the
            seed, so it depends on neither batches nor ranks.
        normalize: Divide by the mean over all weights, so that the mean of F is 1. `fisher_interpolate` wants this,
            as sizes decide there and not only proportions.
        seed: Another seed draws other labels.
        chunk: Samples in flight at once; each holds one gradient.
        reducer: Speaks to the other processes; None is a single one. Without samples a process still takes part.

    Returns:
        One tensor per parameter, shaped like it, in single precision or that of the parameter if it is higher.

    Raises:
        ValueError: There is no sample, `draws` is not positive, or the outputs depend on no weight and are to be
            normalized.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)  # p = 1/2, so the gradient is x (1 - 1/2) or x (0 - 1/2)
        >>> diagonal_fisher(model, [torch.tensor([[1.0], [3.0]])])
        {'weight': tensor([[1.2500],
                [1.2500]])}
    """
    if draws is not None and draws < 1:
        raise ValueError(f"draws must be a positive number or None (all classes), got {draws}")
    reducer = reducer or Reducer()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    like = next(iter(parameters.values()), torch.zeros(()))
    sums = {name: torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for name, p in parameters.items()}
    count = torch.zeros((), dtype=torch.int64, device=like.device)
    with evaluation_mode(model), torch.no_grad():
        for x in batches:
            x = x.to(like.device)
            for part in torch.split(x, chunk) if len(x) else ():
                cotangents = _factor(model(part), part, draws, seed)
                for name, squares in sum_squared_jacobian(model, list(parameters), part, cotangents, chunk).items():
                    sums[name] += squares
            count += len(x)
    for tensor in (count, *sums.values()):
        reducer.sum_(tensor)
    if not count:
        raise ValueError("there is no sample to compute the Fisher information from; give batches of images")
    scale = float(count) * (_mean(sums, int(count)) if normalize else 1.0)
    known = {parameter: sums[name] / scale for name, parameter in parameters.items()}
    everywhere = model.named_parameters(remove_duplicate=False)  # a shared weight has an entry under each of its names
    return {name: known[p].to(_at_least_single(p.dtype), copy=True) for name, p in everywhere if p in known}


def _factor(logits: Tensor, x: Tensor, draws: int | None, seed: int) -> Tensor:
    # Cotangents (V, B, C) whose outer products sum to E[(e_y - p) (e_y - p)^T], since d log p_y / d z = e_y - p.
    probabilities = logits.to(_at_least_single(logits.dtype)).softmax(-1)
    eye = torch.eye(logits.shape[-1], dtype=probabilities.dtype, device=logits.device)
    if draws is None:
        vectors = (eye[:, None] - probabilities) * probabilities.T[..., None].sqrt()
    else:
        vectors = (eye[_draw(probabilities, x, draws, seed)] - probabilities) / draws**0.5
    return vectors.to(logits.dtype)


def _draw(probabilities: Tensor, x: Tensor, draws: int, seed: int) -> Tensor:
    # Labels (draws, B): uniform numbers from random bits that belong to a sample, through the inverse distribution.
    bits = sample_signs(x, draws * _BITS, seed).gt(0).double().view(len(x), draws, _BITS)
    uniform = bits @ (0.5 ** torch.arange(1, _BITS + 1, dtype=torch.float64, device=x.device))
    cumulative = probabilities.double().cumsum(-1)
    labels = torch.searchsorted(cumulative / cumulative[:, -1:], uniform, right=True)
    return labels.clamp(max=probabilities.shape[-1] - 1).T


def _mean(sums: dict[str, Tensor], count: int) -> float:
    mean = sum(float(total.sum()) for total in sums.values()) / sum(total.numel() for total in sums.values()) / count
    if mean == 0:
        raise ValueError("the outputs depend on no weight, so that a Fisher information of mean 1 does not exist")
    return mean


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
