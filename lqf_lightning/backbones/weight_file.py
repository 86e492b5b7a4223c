"""Read files of tensors, whoever wrote them."""

import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


def read_weight_file(path: Path) -> Any:
    """Read a file of tensors without running code that it may hold.

    Args:
        path: A ``.safetensors`` file, or one that ``torch.save`` wrote.

    Returns:
        Its content; plain values and tensors, on the CPU.

    Raises:
        ValueError: If the file is damaged, was not written to its end, or holds Python objects.
    """
    damaged = f"{path} cannot be read; it is damaged, or was not written to its end. Give another file. It said: "
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # not even the beginning of a pickle
            raise ValueError(f"{damaged}{str(error).splitlines()[-1]}") from error
        raise ValueError(
            f"{path} holds Python objects, which are not loaded for safety; expected tensors only. Save the network's "
            "state_dict() and nothing else, or use .safetensors."
        ) from error
    # What torch raises depends on where the file breaks off.
    except (safetensors.SafetensorError, RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"{damaged}{type(error).__name__}: {error}") from error
