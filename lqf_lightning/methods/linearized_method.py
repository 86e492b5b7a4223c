"""A method whose network is its first-order expansion, held to the pre-trained weights by a quadratic penalty."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lqf_lightning.backbones import Backbone
from lqf_lightning.backbones.block_groups import block_groups
from lqf_lightning.linear import LinearizedModel
from lqf_lightning.methods.intercept import is_intercept, tell_missing_intercept
from lqf_lightning.methods.known_groups import known_groups
from lqf_lightning.methods.method import Method


class LinearizedMethod(Method):
    """Predicts ``f0(x) + J(x) dw``, and penalizes ``dw``; subclasses call `linearize` and say what is fitted.

    Attributes:
        linearized: The network's expansion at its pre-trained weights.
        penalty_groups: Parameter names by group of one factor: the layer groups, or their blocks.
        group_ridge: Factor of the ridge per group of these, 1 where absent.
        intercept_name: The bias of the head, where it is free of penalty; else None.
        ridge: Strength of the penalty, in the mean form.
    """

    moves_buffers = False  # broadcasting the frozen ones would only make the linearized model fold them again
    linearized: LinearizedModel
    penalty_groups: dict[str, tuple[str, ...]]
    group_ridge: dict[str, float]
    intercept_name: str | None
    ridge: float
    relative_ridge: float = math.inf

    def linearize(self, group_ridge: Mapping[str, float] | None, intercept: bool, *, by_block: bool = False) -> None:
        """Expand the network of the backbone.

        Args:
            group_ridge: Factor of the ridge per layer group, 1 where absent.
            intercept: Whether the bias of the head is free of penalty.
            by_block: Whether every residual block is to have a factor of its own, which is not known yet.
        """
        backbone = self.backbone
        self.group_ridge = dict(group_ridge or {})
        self.penalty_groups = {group: backbone.groups[group] for group in self.layers}
        if by_block:
            self.penalty_groups = block_groups(backbone, self.layers)
        known_groups(backbone, list(self.group_ridge), "group_ridge")
        side = backbone.image_size
        names = [name for group in self.layers for name in backbone.groups[group]]
        self.linearized = LinearizedModel(backbone.model, names, example=torch.randn(2, 3, side, side))
        bias = f"{backbone.head}.bias"
        self.intercept_name = bias if intercept and is_intercept(self.linearized, bias, side) else None
        tell_missing_intercept(intercept, self.intercept_name, bias)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs of the linearized network.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Outputs (B, C), on the scale of the targets.
        """
        outputs: Tensor = self.linearized(images)
        return outputs

    def penalty(self) -> Tensor | float:
        """Half the ridge times the squared distance from the pre-trained weights, in the metric of the groups.

        Returns:
            A scalar.
        """
        weights = self.penalty_weights()
        norms = torch._foreach_norm([self.linearized.deltas[name] for name in weights])
        squares = torch.stack(list(norms)).square()
        return 0.5 * self.ridge * (squares * squares.new_tensor(list(weights.values()))).sum()

    def penalty_weights(self) -> dict[str, float]:
        """What the ridge is multiplied with, by parameter.

        Returns:
            Factor by parameter name, the intercept left out.
        """
        factors = {n: self.group_ridge.get(group, 1.0) for group, names in self.penalty_groups.items() for n in names}
        return {name: factors[name] for name in self.linearized.deltas if name != self.intercept_name}

    def settled_penalty(self) -> dict[str, Any]:
        """What a checkpoint keeps of a penalty that training has settled.

        Returns:
            Plain values.
        """
        groups = {group: list(names) for group, names in self.penalty_groups.items()}
        settled = {"ridge": self.ridge, "relative_ridge": self.relative_ridge, "group_ridge": dict(self.group_ridge)}
        return settled | {"penalty_groups": groups}

    def networks(self) -> dict[str, Backbone]:
        """None: the linearized network is another function than the network at ``w0 + dw``.

        Returns:
            An empty dictionary.
        """
        return {}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters dw, by the names of the weights they change.

        Returns:
            Name to parameter.
        """
        return self.linearized.deltas
