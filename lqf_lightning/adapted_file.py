"""The file that `lqf-adapt` leaves: weights of a leaky network, and where they come from."""

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import safetensors.torch
from omegaconf import DictConfig, OmegaConf

from lqf_lightning.backbones.library import find_architecture
from lqf_lightning.backbones.published_head import PublishedHead
from lqf_lightning.data.unlabeled_images import UnlabeledImages
from lqf_lightning.methods.realign import Realign

Stages = dict[str, dict[str, float]]
_PACKAGES = ("torch", "torchvision", "timm", "lightning")


def choose_output(config: DictConfig, folder: Path) -> Path:
    """Where the weights go, checked before anything is computed.

    Args:
        config: The composed configuration.
        folder: The run folder.

    Returns:
        The file, absolute.

    Raises:
        ValueError: It has another ending than ``.safetensors``, or its folder cannot be written to.
        FileExistsError: It exists, and ``overwrite=true`` is not set or it is a folder.
    """
    output = Path(config.output or folder / "leaky.safetensors").expanduser().absolute()
    if output.suffix != ".safetensors":
        raise ValueError(f"`output` must end in .safetensors, got {output}. Set output={output.stem}.safetensors")
    if output.is_dir():
        raise FileExistsError(f"{output} is a folder. Set output=FILE.safetensors to write elsewhere")
    if output.exists() and not config.overwrite:
        raise FileExistsError(f"{output} exists. Set overwrite=true, or output=FILE.safetensors to write elsewhere")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {output.parent}: {error}. Set output=FILE.safetensors elsewhere") from error
    return output


def write_adapted(
    output: Path,
    method: Realign,
    head: PublishedHead,
    images: UnlabeledImages,
    config: DictConfig,
    *,
    steps: int,
    stages: Stages,
) -> None:
    """Write the leaky network with its library's names, so that ``backbone.weights=FILE`` of another run reads it.

    The published head comes along where there is one. The file is never seen half-written.

    Args:
        output: The file.
        method: Holds the networks.
        head: What head the weights came with.
        images: What the network was adapted on.
        config: The composed configuration.
        steps: Optimizer steps taken.
        stages: Figures on held-out images by stage.
    """
    network = method.student
    state = {name: tensor.detach().cpu() for name, tensor in network.model.state_dict().items()}
    if not head.outputs:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{network.head}.")}
    partial = output.with_name(output.name + ".partial")
    # Cloned, since safetensors refuses tensors that share their storage.
    whole = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    metadata = _metadata(method, head, images, config, steps, stages)
    partial.write_bytes(_in_order(safetensors.torch.save(whole, metadata)))
    partial.replace(output)


def _in_order(content: bytes) -> bytes:
    # safetensors writes metadata in an order drawn at random, so that the same file would not be the same twice. Places
    # of tensors are counted from the end of the header.
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _metadata(
    method: Realign, head: PublishedHead, images: UnlabeledImages, config: DictConfig, steps: int, stages: Stages
) -> dict[str, str]:
    network, backbone = method.student, config.backbone
    architecture = find_architecture(backbone.name, backbone.get("library"))
    source: Any = OmegaConf.to_container(config.data.source, resolve=True)
    facts: dict[str, Any] = {
        "architecture": architecture.name,
        "library": architecture.library,
        "mean": list(network.mean),
        "std": list(network.std),
        "image_size": config.data.image_size,
        "leaky_slope": float(config.slope),
        "part": "student",
        "method": "lqf_lightning.methods.realign.Realign",
        "adapted_from": network.weights,
        "weights": str(backbone.weights),  # whose run tells which labels they have seen
        "data": source,
        "images": {"train": len(images.train), "held_out": len(images.held_out)},
        "steps": steps,
        "batch_size": config.data.batch_size,
        "seed": config.seed,
        "errors": stages,
        "versions": {name: version(name) for name in _PACKAGES},
        "lqf_lightning": version("lqf-lightning"),
    }
    if backbone.get("stride_in_1x1"):
        facts["stride_in_1x1"] = True
    if head.classes:
        facts["classes"] = list(head.classes)
    # "format" is what the readers of Hugging Face and timm look for.
    return {"format": "pt"} | {name: v if isinstance(v, str) else json.dumps(v) for name, v in facts.items()}


def verdict(stages: Stages) -> tuple[bool, str]:
    """Say whether adapting brought the network closer to its original than it was before.

    Args:
        stages: Figures on held-out images by stage: "adapted", and those before.

    Returns:
        Whether it did, and the same in words.

    Example:
        >>> verdict({"swapped": {"feature_error": 2.0}, "adapted": {"feature_error": 0.5}})[0]
        True
    """
    after, before = stages["adapted"], [gap for stage, gap in stages.items() if stage != "adapted"]
    error, best = after["feature_error"], min(gap["feature_error"] for gap in before)
    agreed = after.get("agreement", 0.0) >= max(gap.get("agreement", 0.0) for gap in before)
    if not (error < best and agreed):
        fewer = "" if agreed else "; fewer images get the original's class than before"
        return False, (
            f"Adapting did not work: the features' relative error on held-out images is {error:.4g}, and was "
            f"{best:.4g} at best before{fewer}. Give more images, or set trainer.max_epochs higher or "
            "method.optimizer.lr lower"
        )
    far = ". It is still far from its original: more images or epochs would help" if error > 1 else ""
    return True, f"Adapting lowered the features' relative error on held-out images from {best:.4g} to {error:.4g}{far}"


def usage(config: DictConfig, output: Path) -> str:
    """The lines that start another run from the file.

    Args:
        config: The composed configuration.
        output: The file.

    Returns:
        A text of several lines.
    """
    backbone = config.backbone
    architecture = find_architecture(backbone.name, backbone.get("library"))
    given = [f"backbone.{name}={list(backbone[name])}" for name in ("mean", "std") if backbone.get(name) is not None]
    options = [*given, *(["backbone.stride_in_1x1=true"] if backbone.get("stride_in_1x1") else [])]
    named = " ".join([f"backbone={architecture.library}", f"backbone.name={architecture.name}", *options])
    return (
        f"Written: {output}\nIn another run:\n  lqf-train {named} \\\n"
        f"    backbone.weights={output} backbone.leaky_slope={float(config.slope)}"
    ).replace("', '", "','")
