"""What another run of the same method has trained."""

from pathlib import Path

import torch
from torch import Tensor

from lqf_lightning.methods import Method


def weights_of_checkpoint(method: Method, checkpoint: Path) -> dict[str, Tensor]:
    """Read what another run of the same method has trained.

    Args:
        method: The method; it keeps its weights.
        checkpoint: Of the other run.

    Returns:
        Weights by `method.trained()` name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another network, or of one that began at other weights.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {checkpoint}. Set callbacks.scrub.retrained=RUN/checkpoints/last.ckpt"
        )
    state = torch.load(checkpoint, map_location=method.device, weights_only=True)["state_dict"]
    own = method.state_dict()
    prefix = prefix_of_trained(method)
    trained = {f"{prefix}{name}" for name in method.trained()}
    odd = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if odd:
        raise ValueError(
            f"{checkpoint} is of another network: {odd[0]} is missing or of another shape. Train it with the options "
            "of the run that forgets"
        )
    others = [
        key for key in own if key not in trained and key.startswith("linearized.") and not _same(own[key], state[key])
    ]
    if others:
        raise ValueError(
            f"{checkpoint} is linearized around other weights ({others[0]} differs): its movement cannot be "
            "compared. Train it with the seed and backbone of the run that forgets"
        )
    return {name: state[f"{prefix}{name}"].to(parameter) for name, parameter in method.trained().items()}


def prefix_of_trained(method: Method) -> str:
    """Find what the keys of a method's state begin with, before the names of `method.trained()`.

    Args:
        method: The method.

    Returns:
        The beginning.

    Raises:
        RuntimeError: The method keeps its parameters elsewhere.
    """
    parameters = method.trained()
    name, wanted = next(iter(parameters.items()))
    for key, parameter in method.named_parameters(remove_duplicate=False):
        if parameter is wanted and key.endswith(name):
            return key.removesuffix(name)
    raise RuntimeError(f"{type(method).__name__} has no parameter {name!r} among its own")


def _same(first: Tensor, second: Tensor) -> bool:
    return bool(torch.equal(first, second.to(first)))
