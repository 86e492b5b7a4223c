"""How good held-out predictions are: the numbers by which a ridge, or anything else, is chosen."""

import math

import torch
from torch import Tensor

_HALVINGS = 80


def held_out_accuracy(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The share of samples whose largest prediction is at the largest target.

    Args:
        prediction: Predictions of models that have not seen the sample (..., n, C), C at least 2.
        target: Targets (n, C), largest at the right class.
        weight: Sample weights (n,); None means 1.

    Returns:
        Shares (...), of the total weight.

    Raises:
        ValueError: There is one output only, of which none is the largest.

    Example:
        >>> import torch
        >>> float(held_out_accuracy(torch.tensor([[0.2, 0.1], [0.4, 0.3]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])))
        0.5
    """
    if prediction.shape[-1] < 2:
        raise ValueError("the accuracy of a single output is not defined; choose by 'press'")
    right = (prediction.argmax(-1) == target.argmax(-1)).double()
    return _mean(right, weight)


def held_out_press(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""The predicted residual sum of squares (PRESS), :math:`\sum_i a_i \lVert y_i - f_{-i}(x_i) \rVert^2`.

    Args:
        prediction: Predictions of models that have not seen the sample (..., n, C).
        target: Targets (n, C).
        weight: Sample weights (n,); None means 1.

    Returns:
        Sums (...).

    Example:
        >>> import torch
        >>> float(held_out_press(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])))
        5.0
    """
    squares = (target.double() - prediction.double()).square().sum(-1)
    return squares.sum(-1) if weight is None else (squares * weight.double()).sum(-1)


def held_out_cross_entropy(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The cross-entropy of predictions divided by the temperature that suits them best.

    Squared-loss predictions are no logits, but up to a common factor they rank classes as logits do. The mean of
    :math:`-\log \mathrm{softmax}(f / T)_{y}` is convex in 1/T, whose optimum is found by bisection.

    Args:
        prediction: Predictions of models that have not seen the sample (..., n, C), C at least 2.
        target: Targets (n, C), largest at the right class.
        weight: Sample weights (n,); None means 1.

    Returns:
        Nats per sample (...), at most log C, and temperatures (...): infinite where no temperature beats guessing.

    Raises:
        ValueError: There is one output only.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
        >>> target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> value, temperature = held_out_cross_entropy(scores, target)  # right in 3 of 4: softmax(f / T) = 3/4
        >>> round(float(value), 4), round(float(temperature), 4)
        (0.5623, 2.7307)
    """
    if prediction.shape[-1] < 2:
        raise ValueError("the cross-entropy of a single output is not defined; choose by 'press'")
    scores = prediction.double() - prediction.double().mean(-1, keepdim=True)
    wanted = target.argmax(-1).expand(scores.shape[:-1]).unsqueeze(-1)
    low = torch.zeros(scores.shape[:-2], dtype=torch.float64, device=scores.device)
    spread = scores.square().mean((-1, -2)).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    high = 1e3 / spread  # beyond it separable predictions gain nothing that is visible
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        share = torch.softmax(middle[..., None, None] * scores, -1)
        slope = _mean((share * scores).sum(-1) - scores.gather(-1, wanted)[..., 0], weight)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    useful = low > 0
    inverse = torch.where(useful, (low + high) / 2, 0.0)
    loss = -torch.log_softmax(inverse[..., None, None] * scores, -1).gather(-1, wanted)[..., 0]
    return _mean(loss, weight), torch.where(useful, 1 / inverse.clamp_min(1e-300), math.inf)


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values.mean(-1)
    return (values * weight.double()).sum(-1) / weight.double().sum()
