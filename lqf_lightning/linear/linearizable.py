"""What a network must be like before it can be linearized, said before the first batch."""

import difflib
from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

WRAPPERS = {
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "OptimizedModule",
    "ScriptModule",
    "LinearizedModel",
}


def check_linearizable(model: nn.Module) -> None:
    """Refuse wrappers and networks without a fixed evaluation form.

    Args:
        model: The network to linearize.

    Raises:
        TypeError: If the network, or a part of it, is a wrapper that must stay outside.
        ValueError: If a batch normalization keeps no running statistics.
    """
    for name, module in model.named_modules():
        wrapper = WRAPPERS & {cls.__name__ for cls in type(module).__mro__}
        if wrapper:
            where = f"its part {name!r}" if name else "the model"
            raise TypeError(
                f"cannot linearize: {where} is a {wrapper.pop()}. Linearize the inner network (for example "
                "`wrapped.module`, or `compiled._orig_mod`), then wrap or compile the LinearizedModel"
            )
    bare = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    if bare:
        raise ValueError(
            f"cannot linearize: the batch normalizations {', '.join(bare)} keep no running statistics, so the network "
            "has no evaluation form and a prediction would depend on the rest of its batch. Build them with "
            "track_running_stats=True and load or estimate their statistics"
        )


def resolve_parameters(model: nn.Module, names: Iterable[str] | None) -> tuple[str, ...]:
    """Put the names of the trained parameters in the order of the network.

    Args:
        model: The network to linearize.
        names: Chosen names, or None for all.

    Returns:
        Distinct names in the order of `model.named_parameters()`.

    Raises:
        TypeError: If `names` is one string, which would be read letter by letter.
        ValueError: If a name is unknown, none is left, or a chosen parameter is shared between modules.
    """
    if isinstance(names, str):
        raise TypeError(f"parameters must be a collection of names, got the string {names!r}: write [{names!r}]")
    known = dict(model.named_parameters(remove_duplicate=False))
    chosen = set(known) if names is None else set(names)
    for name in sorted(chosen - set(known)):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise ValueError(f"the model has no parameter {name!r}; the nearest names are {', '.join(near)}")
    if not chosen:
        raise ValueError("no parameters to linearize: give at least one name, or None for all of them")
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in known.items():
        owners[id(parameter)].append(name)
    for aliases in owners.values():
        if len(aliases) > 1 and chosen & set(aliases):
            raise ValueError(
                f"cannot linearize a shared parameter: {' and '.join(aliases)} are one tensor, so a movement of one "
                "would move both. Untie them with copy.deepcopy, or leave them out of `parameters`"
            )
    return tuple(name for name in known if name in chosen)
