"""A Kronecker-factored model of the Gauss-Newton matrix at `w0`, and its inverse.

For squared loss and a linearized model the Gauss-Newton matrix *is* the Hessian, and it depends on neither labels nor
`dw`: it is estimated once, before training (LQF, arXiv 2012.11140, section 3.2).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lqf_lightning.linear.kronecker_factors import KroneckerFactors
from lqf_lightning.linear.reducer import Reducer

Tensors = dict[str, Tensor]
Damping = float | Mapping[str, float]


class KFAC:
    """Approximates `(H + damping I)^-1` for `H = (1/N) sum_i J_i^T J_i`.

    A layer with factors `A (x) G` is inverted in their eigenbases, with damping added to the Kronecker *eigenvalues*:
    for a single dense layer the result is the exact inverse, which the usual split of the damping over the factors
    is not. Other parameters are divided by their diagonal of `H`.
    Eigenvectors come from double precision (single precision fails on rank-deficient factors), once: about `9 d^3`
    operations, so a 3x3 convolution with 512 channels (d = 4608) takes about 20 s on one CPU core. Ranks share the
    layers. Applying costs `2 P (d + o)` multiplications per step in the type of the factors, whatever the batch.

    Args:
        factors: Kronecker factors by layer name.
        diagonals: Diagonals by parameter name.
        damping: `mu`, the strength of the penalty `mu/2 |dw|^2` in the mean objective, or more.
        relative_floor: Further damping, in units of the mean eigenvalue of each block.
        reducer: Sums and broadcasts over ranks.
        watch: Wraps the layer names while their factors are decomposed, e.g. to show progress.

    Attributes:
        factors: As given.
        diagonals: As given.
        names: All parameters that are covered.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lqf_lightning.linear import fit_kfac
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> kfac = fit_kfac(net, None, [x], damping=0.5, relative_floor=0.0)
        >>> gradient = torch.tensor([[1.0, 5.0]])  # H = diag(0.5, 2)
        >>> kfac.precondition({"weight": gradient})["weight"].round(decimals=4).tolist()
        [[1.0, 2.0]]
    """

    def __init__(
        self,
        factors: dict[str, KroneckerFactors],
        diagonals: dict[str, Tensor],
        *,
        damping: float,
        relative_floor: float = 1e-3,
        reducer: Reducer | None = None,
        watch: Callable[[list[str]], Iterable[str]] = iter,
    ) -> None:
        if damping < 0 or relative_floor < 0 or damping + relative_floor == 0:
            raise ValueError(
                f"got damping={damping} and relative_floor={relative_floor}, expected non-negative values of which at "
                "least one is positive"
            )
        self.factors, self.diagonals = factors, diagonals
        self.damping, self.relative_floor = damping, relative_floor
        self.names = set(diagonals) | {name for layer in factors.values() for name in _members(layer)}
        reducer = reducer or Reducer()
        self._bases: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for position, name in enumerate(watch(list(factors))):
            layer = factors[name]
            source = position % reducer.world_size
            inputs, input_basis = _eigenbasis(layer.inputs, source, reducer)
            outputs, output_basis = _eigenbasis(layer.outputs, source, reducer)
            self._bases[name] = (outputs.unsqueeze(2) * inputs.unsqueeze(1), output_basis, input_basis)

    def precondition(self, gradients: Tensors) -> Tensors:
        """Apply the approximate inverse.

        Args:
            gradients: Gradient of the mean objective (penalty included) by parameter name.

        Returns:
            Newton-like direction by parameter name, in the types of the gradients.
        """
        return self._map(gradients, lambda values, _: (values + self.damping + self._floor(values)).reciprocal())

    def solve(self, gradients: Tensors, *, scale: float, damping: Damping) -> Tensors:
        r"""Apply :math:`(s\,H + D)^{-1}` for any scale s and damping D, from the same eigenvectors.

        Args:
            gradients: What to apply it to, by parameter name.
            scale: s, the number of samples for an objective in sum form.
            damping: D, positive, one number or one per parameter name (the same within a layer).

        Returns:
            The result by parameter name.

        Raises:
            ValueError: A damping is not positive, so that the inverse may not exist.
        """
        strengths = damping.values() if isinstance(damping, Mapping) else [damping]
        if not all(strength > 0 for strength in strengths):
            raise ValueError(f"the damping of an inverse must be positive, got {damping}")
        return self._map(gradients, lambda values, name: (scale * values + _own(damping, name)).reciprocal())

    def multiply(self, direction: Tensors, *, scale: float = 1.0, damping: Damping = 0.0) -> Tensors:
        r"""Apply :math:`s\,H + D`.

        Args:
            direction: What to apply it to, by parameter name.
            scale: s.
            damping: D, one number or one per parameter name (the same within a layer).

        Returns:
            The result by parameter name.
        """
        return self._map(direction, lambda values, name: scale * values + _own(damping, name))

    def _floor(self, values: Tensor) -> Tensor:
        mean = values.mean((-2, -1), keepdim=True) if values.dim() == 3 else values.mean()
        return (self.relative_floor * mean).clamp_min(1e-30)

    def _map(self, tensors: Tensors, function: Callable[[Tensor, str], Tensor]) -> Tensors:
        if set(tensors) != self.names:
            odd = sorted(self.names.symmetric_difference(tensors))
            raise ValueError(f"got gradients of other parameters than were fitted; the first odd one is {odd[0]!r}")
        result = dict(tensors)
        for name, diagonal in self.diagonals.items():
            flat = diagonal.flatten()
            factor = function(flat, name).reshape(diagonal.shape)
            result[name] = (tensors[name].to(diagonal.dtype) * factor).to(tensors[name].dtype)
        for layer_name, (values, output_basis, input_basis) in self._bases.items():
            members = _members(self.factors[layer_name])
            parts = [tensors[name].reshape(*values.shape[:2], -1) for name in members]
            joined = torch.cat(parts, -1).to(values.dtype)
            rotated = (output_basis.mT @ joined @ input_basis) * function(values, members[0])
            pieces = torch.split(output_basis @ rotated @ input_basis.mT, [part.shape[-1] for part in parts], -1)
            for name, piece in zip(members, pieces, strict=True):
                result[name] = piece.reshape(tensors[name].shape).to(tensors[name].dtype)
        return result


def _members(layer: KroneckerFactors) -> list[str]:
    return [name for name in (layer.weight, layer.bias) if name]


def _own(damping: Damping, name: str) -> float:
    return damping if isinstance(damping, (int, float)) else damping[name]


def _eigenbasis(factor: Tensor, source: int, reducer: Reducer) -> tuple[Tensor, Tensor]:
    values, basis = torch.zeros_like(factor[..., 0]), torch.zeros_like(factor)
    if reducer.rank == source:
        wide = factor.cpu() if factor.device.type == "mps" else factor
        exact = torch.linalg.eigh(wide.double())
        values.copy_(exact.eigenvalues.clamp_min(0))
        basis.copy_(exact.eigenvectors)
    # Eigenvectors are not unique, so all ranks use those of one.
    return reducer.broadcast_(values, source), reducer.broadcast_(basis, source)
