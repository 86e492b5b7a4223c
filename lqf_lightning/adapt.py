"""`lqf-adapt`: a leaky network from any published one, re-aligned with its original on unlabeled images."""

import logging
import warnings
from pathlib import Path
from typing import Any, cast

import hydra
from lightning import seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lqf_lightning._instantiate import instantiate
from lqf_lightning._launch import in_sweep, is_many_processes, one_job, run_in_own_process
from lqf_lightning.adapted_file import choose_output, usage, verdict, write_adapted
from lqf_lightning.backbones import Backbone
from lqf_lightning.backbones.library import find_architecture
from lqf_lightning.backbones.published_head import PublishedHead, published_head
from lqf_lightning.backbones.told_slope import told_slope
from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.unlabeled_images import UnlabeledImages
from lqf_lightning.methods.realign import Realign
from lqf_lightning.resume import checkpoint_to_resume, make_paths_absolute
from lqf_lightning.run_folder import forget_results, write_metrics, write_start
from lqf_lightning.train import build_trainer, prepare_process

log = logging.getLogger(__name__)
_MODULE = "lqf_lightning.adapt"
_PLAIN = {"leaky_slope": None, "fold_batch_norm": False, "pooling": "average"}
_ALONE = 2  # outputs of a head that stands in where none was published


def adapt(config: DictConfig) -> Path:
    """Swap the activations of a published network for leaky ones, re-align it with the original, and write it down.

    Args:
        config: The composed configuration (see ``conf/adapt.yaml``).

    Returns:
        The file of weights.
    """
    folder = Path(config.paths.output_dir)
    make_paths_absolute(config)
    _refuse(config)
    output = choose_output(config, folder)
    resumed = checkpoint_to_resume(config, folder)
    # A used folder is what resuming and starting over are about.
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    if not resumed:
        forget_results(folder)
    images, method, head = build_adaptation(config)
    write_start(folder, config)
    trainer = build_trainer(config, folder)
    for logger in trainer.loggers:
        logger.log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))
    trainer.fit(method, datamodule=images, ckpt_path=resumed, weights_only=True)
    trainer.validate(method, datamodule=images, verbose=False)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    stages = {**method.gaps, "adapted": {name.removeprefix("val/"): value for name, value in figures.items()}}
    write_metrics(folder, {f"{stage}/{name}": v for stage, gap in stages.items() for name, v in gap.items()})
    if trainer.is_global_zero:
        write_adapted(output, method, head, images, config, steps=trainer.global_step, stages=stages)
    _say(stages, config, output)
    return output


def build_adaptation(config: DictConfig) -> tuple[UnlabeledImages, Realign, PublishedHead]:
    """The images and the pair of networks of a configuration.

    Args:
        config: The composed configuration.

    Returns:
        The images without labels, the method, and what head the weights came with.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    data: ImageDataModule = instantiate(config, "data")
    data.prepare_data()
    data.setup()
    architecture = find_architecture(config.backbone.name, config.backbone.get("library"))
    head = published_head(architecture, config.backbone.weights)
    original: Backbone = instantiate(config, "backbone", num_classes=head.outputs or _ALONE)
    data.normalization = (original.mean, original.std)
    images = UnlabeledImages(data, **config.images, seed=config.seed)
    options = {"original": original, "head_is_published": bool(head.outputs), "slope": config.slope}
    method: Realign = instantiate(config, "method", **options)
    return images, method, head


def _refuse(config: DictConfig) -> None:
    backbone, data, slope = config.backbone, config.data, config.slope
    if not (isinstance(slope, int | float) and not isinstance(slope, bool) and 0 <= slope <= 1):
        raise ValueError(f"`slope` of the leaky activations must be a number in [0, 1], got {slope}. Set slope=0.1")
    if backbone.weights is None:
        raise ValueError(
            "backbone.weights=null draws a network at random, which has nothing to be re-aligned with. Set "
            "backbone.weights=default, package or FILE"
        )
    if (told := told_slope(backbone.weights)) is not None:
        raise ValueError(
            f"backbone.weights={backbone.weights} is of a network that is leaky already, of slope {told}. Set "
            "backbone.weights to those of the network as published"
        )
    changed = {name: backbone.get(name, plain) for name, plain in _PLAIN.items() if backbone.get(name, plain) != plain}
    if changed:
        wanted = " ".join(f"backbone.{name}={'null' if _PLAIN[name] is None else _PLAIN[name]}" for name in changed)
        raise ValueError(
            f"got {changed} of backbone, expected the network as published. Set {wanted.replace('False', 'false')}; "
            "the slope of the new activations is slope=0.1"
        )
    if data.get("shots") is not None:
        raise ValueError(
            f"data.shots={data.shots} chooses images by their labels, which must not enter. Set data.shots=null, and "
            "data.subset_ratio=0.1 for fewer images"
        )
    # Held out per class it would be; what is held out here is drawn by images.held_out, whatever the label.
    config.data.val_fraction = 0.0


@rank_zero_only
def _say(stages: dict[str, dict[str, float]], config: DictConfig, output: Path) -> None:
    for stage, gap in stages.items():
        log.info("%-10s %s", stage, "  ".join(f"{name} {value:.4f}" for name, value in gap.items()))
    worked, words = verdict(stages)
    log.log(logging.INFO if worked else logging.WARNING, "%s", words)
    log.info("%s", usage(config, output))


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="adapt")
def _run(config: DictConfig) -> None:
    if in_sweep() and is_many_processes(config.trainer.get("devices", "auto"), config.trainer.get("num_nodes", 1)):
        run_in_own_process(_MODULE)
        return
    with one_job(_MODULE):
        adapt(config)


def main() -> None:
    """Entry point of ``lqf-adapt``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
