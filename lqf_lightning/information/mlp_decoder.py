"""What a small network reads out of a representation, stopped early."""

import copy
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fit_mlp_decoder(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    prior: Tensor,
    *,
    hidden: tuple[int, ...] = (64,),
    lr: float = 3e-3,
    steps: int = 500,
    patience: int = 50,
    seed: int = 0,
) -> Callable[[Tensor], Tensor]:
    r"""A multilayer perceptron, :math:`\mathrm{softmax}(\log p_0 + g(z))`, of one or two hidden layers.

    It is trained by full-batch Adam on the cross-entropy. The last layer starts at zero, so that the decoder starts as
    the prior, and the step with the least cross-entropy on other samples is kept, the start included: a decoder that
    cannot help does not harm.

    Args:
        train: Features (n, D), of zero mean and unit variance, and class positions (n,), which are fitted.
        held_out: The same of other samples, which decide when to stop.
        prior: Log probabilities without any feature (K,), nats.
        hidden: Widths of the hidden layers.
        lr: Learning rate of Adam.
        steps: Most steps.
        patience: Steps without improvement before it stops.
        seed: Of the weights it starts from; the random state of the process is left alone.

    Returns:
        The decoder: features (n, D) to log probabilities (n, K), nats, in double precision.

    Raises:
        ValueError: There is no hidden layer, or a number is not positive.
    """
    if not hidden or not min(*hidden, lr, steps, patience) > 0:
        raise ValueError(
            f"a multilayer perceptron needs hidden layers and positive numbers, got hidden={hidden}, lr={lr}, "
            f"steps={steps}, patience={patience}; for a decoder without a hidden layer use the linear one"
        )
    prior = prior.double()
    network = _build((train[0].shape[1], *hidden, len(prior)), seed).to(prior.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    rows, others = train[0].double(), held_out[0].double()
    best, least, since = copy.deepcopy(network), float(_loss(network, prior, others, held_out[1]).detach()), 0
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(network, prior, rows, train[1]).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        with torch.no_grad():
            value = float(_loss(network, prior, others, held_out[1]))
        since += 1
        if value < least:
            best, least, since = copy.deepcopy(network), value, 0
        if since == patience:
            break
    return lambda z: F.log_softmax(prior + best(z.double()), dim=1).detach()


def _loss(network: nn.Module, prior: Tensor, rows: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(prior + network(rows), label)


def _build(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(one, two, dtype=torch.float64) for one, two in itertools.pairwise(widths)]
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])
