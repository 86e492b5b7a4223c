"""A network without its classifier, and a projector on its features."""

from typing import NamedTuple, cast

from torch import Tensor, nn

from lqf_lightning.backbones import Backbone, penultimate_features


class Encoding(NamedTuple):
    """What an encoder makes of images.

    Attributes:
        features: What would enter the classifier (B, F).
        projection: What the projector makes of them (B, D).
    """

    features: Tensor
    projection: Tensor


class Encoder(nn.Module):
    """Images to features and their projection.

    Args:
        backbone: The network; its head stays as it is.
        projector: Features (B, F) to projections (B, D).
    """

    def __init__(self, backbone: Backbone, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.projector = projector

    def forward(self, images: Tensor) -> Encoding:
        """Encode.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Features and projections.
        """
        features = penultimate_features(self.backbone, images)
        return Encoding(features, self.projector(features))


def feature_width(backbone: Backbone) -> int:
    """Number of features that enter the head.

    Args:
        backbone: The network.

    Returns:
        F.
    """
    return cast(Tensor, backbone.model.get_submodule(backbone.head).weight)[0].numel()


def two_layers(inputs: int, hidden: int, outputs: int, *, batch_norm: bool) -> nn.Sequential:
    """A perceptron with one hidden layer, as projectors and predictors are.

    Args:
        inputs: Width of what enters.
        hidden: Width of the hidden layer.
        outputs: Width of what leaves.
        batch_norm: Linear-BN-ReLU-Linear without biases, as in BYOL; otherwise Linear-ReLU-Linear, as in MoCo v2.

    Returns:
        The network.

    Raises:
        ValueError: A layer would have no output.
    """
    if min(hidden, outputs) < 1:
        raise ValueError(
            f"layers need at least one output, got hidden_width={hidden} and projection_width={outputs}. Set "
            "method.hidden_width=2048 or method.projection_width=128"
        )
    first = nn.Linear(inputs, hidden, bias=not batch_norm)
    normalized = [nn.BatchNorm1d(hidden)] if batch_norm else []
    return nn.Sequential(first, *normalized, nn.ReLU(inplace=True), nn.Linear(hidden, outputs, bias=not batch_norm))
