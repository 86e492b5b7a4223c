"""How well a classifier does on each sample of a batch."""

import torch
from torch import Tensor

OUTCOMES = ("loss", "correct", "confidence", "top_confidence", "margin")


def sample_outcomes(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    r"""Judge every sample by itself, with probabilities :math:`p = \mathrm{softmax}(f)`.

    Args:
        logits: Outputs f (B, C), C at least 2.
        target: Class positions y (B,).

    Returns:
        `loss` :math:`-\log p_y` (nats, whatever loss trains), `correct` (1 if y has the largest output, else 0),
        `confidence` :math:`p_y`, `top_confidence` :math:`\max_c p_c`, and `margin`
        :math:`f_y - \max_{c \ne y} f_c` in units of the outputs, each (B,), in single precision or better.

    Example:
        >>> import torch
        >>> found = sample_outcomes(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([0, 1]))
        >>> for name, values in found.items():
        ...     print(name, [round(value, 4) for value in values.tolist()])
        loss [0.6931, 2.1269]
        correct [1.0, 0.0]
        confidence [0.5, 0.1192]
        top_confidence [0.5, 0.8808]
        margin [0.0, -2.0]
    """
    outputs = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    label = target.unsqueeze(1)
    log_probability = outputs.log_softmax(1)
    own = log_probability.gather(1, label).squeeze(1)
    others = outputs.scatter(1, label, float("-inf")).amax(1)
    return {
        "loss": -own,
        "correct": (outputs.argmax(1) == target).to(outputs),
        "confidence": own.exp(),
        "top_confidence": log_probability.amax(1).exp(),
        "margin": outputs.gather(1, label).squeeze(1) - others,
    }
