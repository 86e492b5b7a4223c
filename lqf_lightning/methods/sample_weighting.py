"""How much each training sample counts in the loss of a method."""

from typing import Any

from lightning import LightningModule
from torch import Tensor


class SampleWeighting(LightningModule):
    r"""Looks sample weights up by index, for methods whose data term is :math:`\frac1B \sum_i a_i\, l_i`.

    The sum is divided by the number of samples, whatever they weigh: a sample of weight 2 pulls like two, one of weight
    0 not at all. ``train/loss`` is this sum, since it is what training lowers; accuracies, and the losses of
    evaluation, count every sample once.
    """

    sample_weights: Tensor | None = None  # by index, where the data module has weights
    weighs_samples = False  # whether the loss of training takes them; say so in a method that does

    def setup(self, stage: str) -> None:
        """Take the sample weights of the data module, or refuse them.

        Args:
            stage: "fit", or another.

        Raises:
            ValueError: There are weights, and the method cannot use them.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        self.sample_weights = getattr(data, "sample_weights", None)
        if self.sample_weights is not None and not self.weighs_samples and stage == "fit":
            raise ValueError(
                f"{type(self).__name__} cannot weigh samples, at least not with these options, but "
                f"data.weights={getattr(data, 'weights', None)} asks for it. Set data.weights=null, or method=finetune "
                "or method=lqf without a reference"
            )

    def weights_of(self, index: Tensor) -> Tensor | None:
        """Look up how much samples count.

        Args:
            index: Their indices (B,).

        Returns:
            Weights (B,) in double precision, or None if all samples count alike.
        """
        if self.sample_weights is None:
            return None
        if self.sample_weights.device != index.device:  # once; as a buffer, DDP would broadcast them in every step
            self.sample_weights = self.sample_weights.to(index.device)
        return self.sample_weights[index]

    @property
    def heaviest_sample(self) -> float:
        """The largest weight, but at least 1: what the curvature of the data term grows by at most."""
        return 1.0 if self.sample_weights is None else max(1.0, float(self.sample_weights.max()))
