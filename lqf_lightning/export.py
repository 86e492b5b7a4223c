"""`lqf-export`: the network of a finished run as plain weights, for timm, torchvision or another run."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import safetensors.torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lqf_lightning.backbones.head import find_head
from lqf_lightning.backbones.library import Architecture, find_architecture
from lqf_lightning.backbones.run_checkpoint import RunNetwork, network_in_run
from lqf_lightning.backbones.weight_file import read_weight_file
from lqf_lightning.resume import run_config
from lqf_lightning.train import prepare_process

_VARIANTS = ("leaky_slope", "stride_in_1x1")  # they change what a network computes, but not its tensors' names


def export(config: DictConfig) -> Path:
    """Write one network of a checkpoint as safetensors, with the names that its library gives the tensors.

    The file's metadata say what the network is, what input it expects and where it comes from. The head is left out
    if the method did not train it. Folding batch norm drops tensors that the library's network has and adds others, so
    that a run with ``backbone.fold_batch_norm=true`` has no plain form, nor has one with second-order pooling; leaky
    activations and moved strides leave the tensors as they are, and are told in the metadata and on the terminal.

    Args:
        config: The composed configuration (see ``conf/export.yaml``).

    Returns:
        The file.

    Raises:
        ValueError: The checkpoint is of no run of ours, or its network is linearized or has no such part.
    """
    checkpoint = Path(config.checkpoint).expanduser().absolute()
    run = run_config(checkpoint)
    output = _choose_output(config, checkpoint)
    network = network_in_run(read_weight_file(checkpoint), checkpoint, str(config.part))
    if network is None or not network.classes:
        raise ValueError(
            f"{checkpoint} is no checkpoint that lqf-train wrote. Set checkpoint=RUN/checkpoints/last.ckpt"
        )
    architecture = find_architecture(run.backbone.name, run.backbone.get("library"))
    head = _check_plain(network, architecture, run)
    kept = {key: t for key, t in network.state.items() if network.head_is_trained or not key.startswith(f"{head}.")}
    _write(output, kept, _metadata(network, architecture, run, checkpoint))
    print("\n".join(_usage(network, architecture, run, output)))
    return output


def _choose_output(config: DictConfig, checkpoint: Path) -> Path:
    chosen = config.output or checkpoint.parent.parent / f"{config.part}.safetensors"
    output = Path(chosen).expanduser().absolute()
    if output.suffix != ".safetensors":
        raise ValueError(f"`output` must end in .safetensors, got {output}. Set output={output.stem}.safetensors")
    if output.exists() and not config.overwrite:
        raise FileExistsError(f"{output} exists. Set overwrite=true, or output=FILE.safetensors to write elsewhere")
    return output


def _check_plain(network: RunNetwork, architecture: Architecture, run: DictConfig) -> str:
    if (pooling := run.backbone.get("pooling", "average")) != "average":
        raise ValueError(
            f"the network of this run is no plain {architecture.name} of {architecture.library}: "
            f"backbone.pooling={pooling} gives its head other features, and their number of weights. Give a checkpoint "
            "of a run with backbone.pooling=average, or use this one through reference=RUN/checkpoints/last.ckpt, or "
            f"backbone.weights=RUN/checkpoints/last.ckpt with backbone.pooling={pooling}."
        )
    plain = architecture.build(len(network.classes), run.backbone.get("image_size"))
    expected = {key: tensor.shape for key, tensor in plain.state_dict().items()}
    found = {key: tensor.shape for key, tensor in network.state.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        reason = "its tensors are not those of that architecture"
        if run.backbone.get("fold_batch_norm"):
            reason = "backbone.fold_batch_norm=true made batch norms part of the convolutions"
        raise ValueError(
            f"the network of this run is no plain {architecture.name} of {architecture.library}: {reason} "
            f"({len(wrong)} differ: {', '.join(wrong[:4])}, ...). Give a checkpoint of a run with "
            "backbone.fold_batch_norm=false, or use this one through reference=RUN/checkpoints/last.ckpt."
        )
    return find_head(plain, len(network.classes), architecture.name)


def _metadata(network: RunNetwork, architecture: Architecture, run: DictConfig, checkpoint: Path) -> dict[str, str]:
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts: dict[str, Any] = {
        "architecture": architecture.name,
        "library": architecture.library,
        "mean": _given(run, "mean") or list(architecture.mean),
        "std": _given(run, "std") or list(architecture.std),
        "image_size": OmegaConf.select(run, "data.image_size") or _given(run, "image_size") or architecture.image_size,
        "part": network.part,
        "method": run.method._target_,
        "checkpoint_sha256": digest,
        "lqf_lightning": version("lqf-lightning"),
    }
    facts |= {name: _given(run, name) for name in _VARIANTS if _given(run, name)}
    if network.head_is_trained:
        facts["classes"] = list(network.classes)
    # "format" is what the readers of Hugging Face and timm look for.
    return {"format": "pt"} | {name: v if isinstance(v, str) else json.dumps(v) for name, v in facts.items()}


def _given(run: DictConfig, name: str) -> Any:
    value = run.backbone.get(name)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _write(output: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    # Cloned, since safetensors refuses tensors that share their storage.
    safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, partial, metadata)
    partial.replace(output)


def _usage(network: RunNetwork, architecture: Architecture, run: DictConfig, output: Path) -> list[str]:
    variants = {name: _given(run, name) for name in _VARIANTS if _given(run, name)}
    given = {name: _given(run, name) for name in ("mean", "std") if _given(run, name)} | variants
    options = "".join(f" backbone.{name}={json.dumps(value, separators=(',', ':'))}" for name, value in given.items())
    head = f"a head for {len(network.classes)} classes" if network.head_is_trained else "no head, which was not trained"
    lines = [
        f"Written: {output} ({network.part}, {head})",
        "In another run:",
        f"  lqf-train backbone={architecture.library} backbone.name={architecture.name}{options} \\",
        f"    backbone.weights={output}",
        "In Python:",
        *(f"  {line}" for line in _python(network, architecture, run, output)),
    ]
    if variants:
        lines += [f"The run changed the network with {variants}, which a fresh one of the library lacks."]
    return lines


def _python(network: RunNetwork, architecture: Architecture, run: DictConfig, output: Path) -> list[str]:
    is_timm = architecture.library == "timm"
    create = "timm.create_model" if is_timm else "torchvision.models.get_model"
    options = f", num_classes={len(network.classes)}" if network.head_is_trained else ", num_classes=0" * is_timm
    if architecture.fixed_size:
        size = run.backbone.get("image_size") or architecture.image_size
        options += f", {'img_size' if is_timm else 'image_size'}={size}"
    strict = "" if network.head_is_trained or is_timm else ", strict=False"
    return [
        f"model = {create}({architecture.name!r}{options})",
        f"model.load_state_dict(safetensors.torch.load_file({str(output)!r}){strict})",
    ]


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="export")
def _run(config: DictConfig) -> None:
    export(config)


def main() -> None:
    """Entry point of ``lqf-export``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
