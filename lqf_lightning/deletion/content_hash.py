"""Hashes by which an auditor tells weights, samples and files from others."""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of names: equal for equal weights in whatever file.

    Args:
        tensors: By name.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> a, b = torch.zeros(2), torch.ones(3)
        >>> tensors_hash({"a": a, "b": b}) == tensors_hash({"b": b, "a": a})
        True
    """
    digest = sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cohort_hash(contents: Iterable[str], salt: str) -> str:
    """SHA-256 over a salt and the sorted content hashes of samples.

    Without the salt, nobody can test whether samples that they have were those of the request: there is nothing to
    compare with. With it, the requester can show which samples the certificate is about.

    Args:
        contents: The column `sha` of the manifest for the samples; those of files that are gone count too.
        salt: Random text.

    Returns:
        64 hexadecimal digits.
    """
    return sha256("\n".join([salt, *sorted(contents)]).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of the bytes of a file.

    Args:
        file: The file.

    Returns:
        64 hexadecimal digits.
    """
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
