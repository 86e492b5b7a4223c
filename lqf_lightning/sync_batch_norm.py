"""Batch norm over all ranks for networks of timm, whose norms may carry their activation."""

from collections.abc import Callable

from lightning.pytorch.plugins.layer_sync import LayerSync
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm


class TimmSyncBatchNorm(LayerSync):
    """Synchronizes batch norms as `trainer.sync_batchnorm=true` asks for, and keeps what timm has fused with them.

    Torch's conversion, which Lightning 2.6 uses, takes timm's ``BatchNormAct2d`` for a plain batch norm and drops its
    activation: the network would compute something else.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace all batch norms.

        Args:
            model: Changed in place; itself no batch norm.

        Returns:
            The model.
        """
        convert: Callable[[nn.Module], nn.Module] = convert_sync_batchnorm
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
                    self._replaced.append((parent, name, child))
                    parent.register_module(name, convert(child))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the batch norms back, with what they have learned and counted meanwhile.

        Args:
            model: The model that `apply` has changed.

        Returns:
            The model.
        """
        for parent, name, original in self._replaced:
            synchronized = parent.get_submodule(name)
            original._parameters.update(synchronized._parameters)
            original._buffers.update(synchronized._buffers)
            original.training = synchronized.training
            parent.register_module(name, original)
        self._replaced.clear()
        return model
