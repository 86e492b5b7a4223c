"""The expected loss of stochastic gradient descent, without drawing a single batch."""

import torch
from torch import Tensor

from lqf_lightning.linear.kernel_spectrum import KernelSpectrum


class ExpectedSGD:
    r"""Second moments of the residual under minibatches, exactly or in fewer numbers.

    Every step draws b of the n samples without replacement, afresh, and takes a plain step of length h on the mean loss
    of the batch. With :math:`r_t = y - f_t` and :math:`M_t = E[r_t r_t^T]`,

    .. math:: M_{t+1} = M_t - \frac hb p_1 (K M_t + M_t K)
        + \frac{h^2}{b^2} K \left[ p_2 M_t + (p_1 - p_2)\,\mathrm{blockdiag}(M_t) \right] K,

    where :math:`p_1 = b / n`, :math:`p_2 = b (b - 1) / (n (n - 1))` and blockdiag keeps the blocks of single samples.
    The expected loss is :math:`\mathrm{tr} M_t / 2n`. The recursion is in the eigenvectors of K: with all of them, or
    all of an eigenvalue above 0, it is exact; with fewer, what the others hold stays as it is, noise included. Momentum
    and decay are not covered, and epochs that deal out every sample once have slightly less noise.

    Args:
        spectrum: The kernel of a problem without intercept and sample weights.
        batch: b, from 1 to n.
        modes: Number of leading eigenvectors that are followed; None: all.

    Raises:
        ValueError: The problem has an intercept, weights or linear terms, or a number is out of range.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear.kernel import Kernel
        >>> from lqf_lightning.linear.problem import QuadraticProblem
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[2.0], [4.0]]), ridge=1.0)
        >>> spectrum = KernelSpectrum(problem, Kernel({"all": torch.eye(2).unsqueeze(0)}, outputs=1))
        >>> [round(float(v), 9) for v in ExpectedSGD(spectrum, batch=1).loss(torch.tensor([1.0]))]  # one is learned
        [5.0, 2.5]
    """

    def __init__(self, spectrum: KernelSpectrum, batch: int, modes: int | None = None) -> None:
        problem = spectrum.system.problem
        if problem.intercept or problem.linear is not None or problem.weight is not None:
            raise ValueError("the moments are those of a problem without intercept, sample weights and linear terms")
        count = spectrum.values.shape[1]
        kept = count if modes is None else modes
        if not 1 <= batch <= problem.samples or not 1 <= kept <= count:
            raise ValueError(
                f"expected a batch of 1 to {problem.samples} samples and 1 to {count} modes, got {batch} and {modes}"
            )
        self.samples, self.batch, self.coupled = problem.samples, batch, spectrum.system.kernel.coupled
        self.values, self.vectors = spectrum.values[:, -kept:], spectrum.vectors[:, :, -kept:]
        self.start = spectrum.projected[:, -kept:]
        others = count - kept
        self.still = spectrum.vectors[:, :, :others] @ spectrum.projected[:, :others]  # what does not move (b, N, s)
        self.floor = float(self.still.square().sum())

    def loss(self, rates: Tensor) -> Tensor:
        """The expected mean training loss; each step costs products of the kept eigenvectors, or N^3 with all.

        Args:
            rates: Learning rates on the mean loss (T,).

        Returns:
            Before every step, and after the last (T + 1,).
        """
        moment, mean = self.start @ self.start.mT, self.start
        history = [self._loss(moment.diagonal(dim1=-2, dim2=-1))]
        drift, pairs, own = self._chances()
        for rate in rates.tolist():
            step = rate / self.batch
            noise = self._single_samples(moment, mean).mul_(own).add_(moment, alpha=pairs)
            lines, columns = self.values.unsqueeze(2), self.values.unsqueeze(1)
            moment = moment - step * drift * (lines + columns) * moment + step**2 * lines * noise * columns
            mean = mean - step * drift * lines * mean  # gradient descent
            history.append(self._loss(moment.diagonal(dim1=-2, dim2=-1)))
        return torch.stack(history)

    def diagonal_loss(self, rates: Tensor) -> Tensor:
        r"""The same with correlations between eigenvectors left out after every step: p^2 operations per step.

        An approximation; noise couples the energies of two modes by :math:`\sum_i (u_{il}^T u_{ij})^2`.

        Args:
            rates: Learning rates on the mean loss (T,).

        Returns:
            Before every step, and after the last (T + 1,).
        """
        energy, coupling = self.start.square().sum(2), self._coupling()
        still = self._single_samples(torch.zeros_like(coupling), torch.zeros_like(self.start))
        steady = still.diagonal(dim1=-2, dim2=-1)
        history = [self._loss(energy)]
        drift, pairs, own = self._chances()
        for rate in rates.tolist():
            step = rate / self.batch * self.values
            noise = steady + (coupling @ energy.unsqueeze(2)).squeeze(2)
            energy = energy * (1 - 2 * drift * step + pairs * step.square()) + own * step.square() * noise
            history.append(self._loss(energy))
        return torch.stack(history)

    def _chances(self) -> tuple[float, float, float]:
        # That a sample is drawn; that two are; and the difference.
        one = self.batch / self.samples
        two = one * (self.batch - 1) / max(self.samples - 1, 1)
        return one, two, one - two

    def _loss(self, energy: Tensor) -> Tensor:
        mean: Tensor = 0.5 * (energy.sum() + self.floor) / self.samples
        return mean

    def _rows(self) -> Tensor:
        blocks, _, kept = self.vectors.shape
        rows: Tensor = self.vectors.reshape(blocks, self.samples, self.coupled, kept)
        return rows

    def _single_samples(self, moment: Tensor, mean: Tensor) -> Tensor:
        # The second moments of each sample by itself, what does not move included.
        rows = self._rows()
        own = rows @ moment.unsqueeze(1) @ rows.mT
        if self.floor:
            still = self.still.reshape(*rows.shape[:3], -1)
            across = (rows @ mean.unsqueeze(1)) @ still.mT
            own = own + across + across.mT + still @ still.mT
        result: Tensor = self.vectors.mT @ (own @ rows).reshape(self.vectors.shape)
        return result

    def _coupling(self) -> Tensor:
        total = torch.zeros(*self.values.shape, self.values.shape[1]).to(self.values)
        for number in range(self.samples):
            rows = self._rows()[:, number]
            total += (rows.mT @ rows).square()
        return total
