"""The course of training on all samples by the squared loss: one number per eigenvector of the kernel and step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.training_rule import TrainingRule


@dataclass(frozen=True)
class TrainingModes:
    r"""What there is to learn, by eigenvector: in these coordinates training is a set of independent numbers.

    Attributes:
        values: Eigenvalues kappa of the kernel (M,).
        residual: :math:`u_j^T (y - f_0)` (M,).
        samples: Number of samples n.
        floor: Squared length of what lies in eigenvectors left out.
        origin: :math:`u_j^T J w_0` (M,), for weight decay towards zero; None: towards the pre-trained weights.
    """

    values: Tensor
    residual: Tensor
    samples: int
    floor: float = 0.0
    origin: Tensor | None = None

    @classmethod
    def of(cls, spectrum: KernelSpectrum, origin: Tensor | None = None) -> "TrainingModes":
        r"""The modes of a decomposed kernel; sample weights count in gradients and loss, :math:`\frac1n \sum_i a_i`.

        Args:
            spectrum: The kernel, weighted by the factors of the learning rates where layer groups differ in them.
            origin: :math:`J w_0` (n, C), see there.

        Returns:
            All modes.

        Raises:
            ValueError: The intercept is kept at its optimum, which descent does not do; or there are linear terms.
        """
        problem = spectrum.system.problem
        if problem.intercept or problem.linear is not None:
            raise ValueError(
                "training moves an intercept like any other weight, and its loss has no linear terms. Give a problem "
                "with intercept=False and linear=None, and the ones of the bias as a group of the kernel"
            )
        values = spectrum.values.unsqueeze(2).expand_as(spectrum.projected).flatten()
        if origin is None:
            return cls(values, spectrum.projected.flatten(), problem.samples)
        sides = spectrum.system.root * spectrum.system.kernel.split(origin.to(values))
        return cls(values, spectrum.projected.flatten(), problem.samples, 0.0, (spectrum.vectors.mT @ sides).flatten())

    def leading(self, rule: TrainingRule, share: float = 0.01) -> "TrainingModes":
        r"""The modes that training moves at all: those with :math:`2 \kappa T / n \ge` `share`.

        The others are as good as constant: :math:`T = \sum_t h_t / (1 - \mu)` bounds how far a residual shrinks to
        :math:`1 - \kappa T / n`, so that what they contribute to the loss is wrong by less than `share` of itself.

        Args:
            rule: Learning rates and momentum.
            share: Relative error that is accepted, in (0, 1).

        Returns:
            Fewer modes, the energy of the others in `floor`.

        Raises:
            ValueError: The share is out of range.
        """
        if not 0 < share < 1:
            raise ValueError(f"the accepted error must be between 0 and 1, got {share}")
        kept = 2 * self.values * (rule.time / self.samples) >= share
        floor = self.floor + float(self.residual[~kept].square().sum())
        origin = None if self.origin is None else self.origin[kept]
        return TrainingModes(self.values[kept], self.residual[kept], self.samples, floor, origin)

    def residuals(self, rule: TrainingRule, decay: float = 0.0) -> Tensor:
        r"""What is left to learn after every step.

        Per mode, with c the coordinate of the dual variable, a step is :math:`g = (\kappa c - u^T r) / n + u c`,
        :math:`v \leftarrow \mu v + g`, :math:`c \leftarrow c - h v`; here for the movement :math:`m = \kappa c`.

        Args:
            rule: Learning rates on the mean loss, and momentum.
            decay: Weight decay u, the mean form of a ridge.

        Returns:
            :math:`u_j^T (y - f_t)` (T + 1, M). Steps that diverge are refused as by `TrainingRule.refuse_divergence`.
        """
        speed = self.values / self.samples
        top = float(speed.max()) if len(speed) else 0.0
        rule.refuse_divergence(top + decay)
        moved, velocity = torch.zeros_like(self.residual), torch.zeros_like(self.residual)
        origin = 0.0 if self.origin is None else self.origin
        history = [self.residual]
        for number, rate in enumerate(rule.rates.tolist()):
            pull = speed * (moved - self.residual) + decay * (moved + origin)
            velocity = pull if number == 0 else rule.momentum * velocity + pull
            moved = moved - rate * (pull + rule.momentum * velocity if rule.nesterov else velocity)
            history.append(self.residual - moved)
        return torch.stack(history)

    def loss(self, rule: TrainingRule, decay: float = 0.0) -> Tensor:
        r"""Mean training loss, :math:`\frac1{2n} \sum_j (u_j^T (y - f_t))^2`.

        Without momentum and decay it is :math:`\frac1{2n} \sum_j q_j (1 - h \kappa_j / n)^{2t}`.

        Args:
            rule: Learning rates on the mean loss, and momentum.
            decay: Weight decay u.

        Returns:
            Loss before every step and after the last (T + 1,).

        Example:
            >>> import torch
            >>> modes = TrainingModes(torch.tensor([1.0]), torch.tensor([8.0]), samples=1)
            >>> modes.loss(TrainingRule(torch.full((2,), 0.5))).tolist()
            [32.0, 8.0, 2.0]
        """
        return 0.5 * (self.residuals(rule, decay).square().sum(1) + self.floor) / self.samples


def training_error(spectrum: KernelSpectrum, residuals: Tensor, label: Tensor, chunk: int = 64) -> Tensor:
    """Share of the training samples whose largest output is not that of their class, after every step.

    Args:
        spectrum: The kernel, its problem without weights.
        residuals: Of all modes (T + 1, M), from `TrainingModes.residuals`.
        label: Class positions (n,).
        chunk: Steps at a time; each step costs a product with the eigenvectors.

    Returns:
        Errors (T + 1,).

    Raises:
        ValueError: Modes are missing, or samples are weighted.
    """
    problem, kernel = spectrum.system.problem, spectrum.system.kernel
    if problem.weight is not None or residuals.shape[1] != spectrum.projected.numel():
        raise ValueError(
            f"errors take all {spectrum.projected.numel()} modes of a problem without sample weights, got "
            f"{residuals.shape[1]} modes"
        )
    errors = []
    for part in torch.split(residuals, chunk):
        left = spectrum.vectors @ part.reshape(len(part), *spectrum.projected.shape)
        for sides in left:
            outputs = problem.target.double() - kernel.join(sides)
            errors.append((outputs.argmax(1) != label).double().mean())
    return torch.stack(errors)
