"""Shadow models where a kernel makes them cheap, or the reason why there are none."""

import torch
from torch import Tensor

from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.analysis.run_problem import problem_of_run
from lqf_lightning.analysis.scrub_linear import ASSEMBLED
from lqf_lightning.analysis.shadow_models import ShadowModels, shadow_models
from lqf_lightning.data import ImageDataModule
from lqf_lightning.methods import LQF, Method


def affordable_shadows(
    method: Method, data: ImageDataModule, cohort: Tensor, count: int, memory_gib: float
) -> tuple[ShadowModels | str, KeptKernel | None]:
    """Make shadow models of a run of up to 4,000 samples times outputs; all ranks have to call this together.

    Args:
        method: The method, attached to a trainer.
        data: Its data module, which still has the cohort.
        cohort: Index of the samples to forget (f,), ascending.
        count: Number of models; 0: none.
        memory_gib: Memory for what the kernel is assembled from, in GiB.

    Returns:
        The models, or why there are none; and the kernel of the training samples, if it was assembled.
    """
    if not count:
        return "none were asked for", None
    if not isinstance(method, LQF):
        return "shadow models are solved from a kernel, which only a linear model has", None
    if not len(data.val_dataloader()):
        return "shadow models are asked about validation images, and there are none: set data.val_fraction=0.1", None
    samples, outputs = len(data.manifest.rows("train")), len(method.classes)
    if samples * outputs > ASSEMBLED:
        return f"the kernel of {samples} samples and {outputs} outputs takes too long", None
    run = problem_of_run(method, form="full", memory_gib=memory_gib)
    kept = KeptKernel(run.kernel.groups, run.kernel.outputs, run.table.index.cpu())
    positions = torch.searchsorted(run.table.index.cpu(), cohort)
    return shadow_models(run, positions, count), kept
