"""Running statistics of batch normalization for weights that no training has seen."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.congruence.pooled_moments import PooledMoments
from lqf_lightning.linear.reducer import Reducer


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Tensor], *, passes: int = 1, reducer: Reducer | None = None
) -> list[str]:
    """Replace the running statistics by those of the data under the weights as they are.

    Every layer gets the mean and the unbiased variance of all its inputs, pooled over batches of any size and over
    processes. A mean over batches, as in training, would count a small last batch like the others, and miss the
    variance between batches where the data are sorted.

    What a layer's inputs are depends on the layers before it. In the first pass all normalize by the statistics of
    their batch, as in training, since the old running statistics are of no use; nothing else is in training mode.
    Layers with no other before them are then exact, and the rest are close for large, well shuffled batches. Each
    further pass runs the network as it will be used, with the statistics found so far, and makes the next layers in
    depth exact: after as many passes as layers follow each other, the running statistics are those of the inputs that
    each layer sees in evaluation, whatever the batches and ranks were.

    Args:
        model: The network, images (B, ...) -> anything; changed in place. Its modes come back afterwards.
        batches: Images of this process, prepared as for evaluation.
        passes: Number of passes over the data.
        reducer: Speaks to the other processes; None is a single one. Without samples a process still takes part.

    Returns:
        Names of the layers that have new statistics; layers that did not run keep theirs.

    Raises:
        ValueError: There is no sample, a batch leaves a single value per channel, `passes` is not positive, or
            synchronized layers meet several processes.
        TypeError: Batches can be walked through only once, and there are several passes.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(1)
        >>> reestimate_batch_norm(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [10.0]])])
        ['']
        >>> model.running_mean.tolist(), model.running_var.tolist()
        ([4.0], [12.5])
    """  # noqa: DOC502 - raised by the functions below
    reducer = reducer or Reducer()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    _check(layers, batches, passes, reducer)
    done: list[str] = []
    for step in range(passes if layers else 0):
        moments = {name: PooledMoments(_statistics(layer)[0]) for name, layer in layers.items()}
        with evaluation_mode(model), _watched(layers, moments), torch.no_grad():
            if step == 0:
                with _batch_statistics(layers):
                    seen = _run(model, batches, layers)
            else:
                seen = _run(model, batches, layers)
        done = _finish(layers, moments, reducer.sum_(seen), reducer)
    return done


def _run(model: nn.Module, batches: Iterable[Tensor], layers: dict[str, _BatchNorm]) -> Tensor:
    device = _statistics(next(iter(layers.values())))[0].device
    seen = torch.zeros((), dtype=torch.int64, device=device)
    for x in batches:
        if len(x):
            try:
                model(x.to(device))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise ValueError(
                    f"a batch of {len(x)} image leaves one value per channel, which has no variance to normalize by; "
                    "give batches of two images or more"
                ) from error
            seen += 1
    return seen


def _finish(
    layers: dict[str, _BatchNorm], moments: dict[str, PooledMoments], seen: Tensor, reducer: Reducer
) -> list[str]:
    if not seen:
        raise ValueError("there is no sample to estimate the statistics of batch normalization from; give images")
    done = []
    for name, layer in layers.items():
        moments[name].reduce(reducer)
        if moments[name].count == 0:
            continue
        mean, variance = _statistics(layer)
        mean.copy_(moments[name].mean)
        variance.copy_(moments[name].variance)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.copy_(seen)
        done.append(name)
    return done


@contextmanager
def _watched(layers: dict[str, _BatchNorm], moments: dict[str, PooledMoments]) -> Iterator[None]:
    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        return layers[name].register_forward_pre_hook(lambda _, inputs: moments[name].add(inputs[0]))

    handles = [watch(name) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _batch_statistics(layers: dict[str, _BatchNorm]) -> Iterator[None]:
    # The flags are set on the layer alone: timm's carry a drop-out inside. Without tracking the buffers stay as they
    # are, so that a pass that fails leaves the model as it was.
    tracking = {name: layer.track_running_stats for name, layer in layers.items()}
    for layer in layers.values():
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.training, layer.track_running_stats = False, tracking[name]


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        raise ValueError("this batch normalization keeps no running statistics")
    return mean, variance


def _check(layers: dict[str, _BatchNorm], batches: Iterable[Tensor], passes: int, reducer: Reducer) -> None:
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    if passes > 1 and isinstance(batches, Iterator):
        raise TypeError(
            f"batches are a {type(batches).__name__}, which is spent after one pass, and there are {passes}; give a "
            "list or a data loader"
        )
    synchronized = [name for name, layer in layers.items() if isinstance(layer, nn.SyncBatchNorm)]
    if synchronized and reducer.world_size > 1:
        raise ValueError(
            f"{synchronized[0]} waits for all processes in every batch, which hangs where their numbers of batches "
            "differ; give the network with plain batch normalization"
        )
