r"""Random maps of Jacobian rows to few numbers that keep inner products on average, :math:`E \Phi_i \Phi_j^T = K_{ij}`.

Every map is drawn from its seed and the position of a parameter, on the CPU, so that all ranks, and training and
validation samples, meet the same one without ever storing it. Rows come by parameter, in the order of the network.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sketch(ABC):
    """A random linear map of Jacobian rows.

    Attributes:
        size: What bounds the number of columns; see the kinds.
        seed: Of the map.
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected a sketch of a positive size, got {self.size}")

    @abstractmethod
    def width(self, shapes: Shapes) -> int:
        """Number of columns.

        Args:
            shapes: Shape of every parameter.

        Returns:
            The width of a sketched row.
        """

    @abstractmethod
    def apply(self, rows: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
        """Map rows.

        Args:
            rows: Rows of m outputs by parameter, each (m, numel).
            shapes: Shape of every parameter.

        Returns:
            Sketched rows (m, width).
        """

    def _generator(self, position: int, block: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + position) * 1_000_003 + block)

    def _is_exact(self, shapes: Shapes) -> bool:
        return self.size >= sum(map(math.prod, shapes.values()))


class DenseSketch(Sketch):
    r"""Random signs over the root of D: an inner product has variance of at most :math:`(|u|^2 |v|^2 + (u v)^2) / D`.

    The most accurate per column, at m P D operations: for small networks. From D = P columns on, rows are kept as they
    are.

    Example:
        >>> import torch
        >>> DenseSketch(4).apply({"weight": torch.tensor([[1.0, 2.0, 3.0]])}, {"weight": (3,)}).tolist()
        [[1.0, 2.0, 3.0]]
    """

    def width(self, shapes: Shapes) -> int:  # noqa: D102 - see the base
        return min(self.size, sum(map(math.prod, shapes.values())))

    def apply(self, rows: Mapping[str, Tensor], shapes: Shapes) -> Tensor:  # noqa: D102 - see the base
        parts = [rows[name] for name in shapes]
        if self._is_exact(shapes):
            return torch.cat(parts, 1)
        result = parts[0].new_zeros(len(parts[0]), self.size)
        for position, part in enumerate(parts):
            for block, columns in enumerate(torch.split(part, max(1, 2**24 // self.size), 1)):
                signs = torch.randint(0, 2, (columns.shape[1], self.size), generator=self._generator(position, block))
                result.addmm_(columns, signs.to(part).mul_(2).sub_(1), alpha=self.size**-0.5)
        return result


class SparseSketch(Sketch):
    """Every number is added, with a random sign, to one of D columns at random (a sparse Johnson-Lindenstrauss map).

    As accurate as the dense map for rows of many small numbers, at m P operations. From D = P columns on, rows are
    kept as they are.
    """

    def width(self, shapes: Shapes) -> int:  # noqa: D102 - see the base
        return min(self.size, sum(map(math.prod, shapes.values())))

    def apply(self, rows: Mapping[str, Tensor], shapes: Shapes) -> Tensor:  # noqa: D102 - see the base
        parts = [rows[name] for name in shapes]
        if self._is_exact(shapes):
            return torch.cat(parts, 1)
        result = parts[0].new_zeros(len(parts[0]), self.size)
        for position, part in enumerate(parts):
            generator = self._generator(position)
            column = torch.randint(0, self.size, part.shape[1:], generator=generator)
            sign = torch.randint(0, 2, part.shape[1:], generator=generator).mul_(2).sub_(1)
            result.index_add_(1, column.to(part.device), part * sign.to(part))
        return result


class CoordinateSketch(Sketch):
    """A random subset of D coordinates, each parameter in proportion to its size, scaled by the root of the share.

    The cheapest map and the least accurate. Parameters smaller than their share of one coordinate get one.
    """

    def width(self, shapes: Shapes) -> int:  # noqa: D102 - see the base
        return sum(self._shares(shapes).values())

    def apply(self, rows: Mapping[str, Tensor], shapes: Shapes) -> Tensor:  # noqa: D102 - see the base
        parts = []
        for position, (name, share) in enumerate(self._shares(shapes).items()):
            part = rows[name]
            chosen = torch.randperm(part.shape[1], generator=self._generator(position))[:share]
            parts.append(part[:, chosen.to(part.device)] * math.sqrt(part.shape[1] / share))
        return torch.cat(parts, 1)

    def _shares(self, shapes: Shapes) -> dict[str, int]:
        counts = {name: math.prod(shape) for name, shape in shapes.items()}
        ratio = min(1.0, self.size / sum(counts.values()))
        return {name: max(1, round(count * ratio)) for name, count in counts.items()}


class KroneckerSketch(Sketch):
    r"""Each parameter as a matrix (outputs, inputs), projected on both sides to `size` random directions.

    What a layer's inputs and cotangents can be projected to before their outer product is formed (LoGra, arXiv
    2405.13954). For a single layer the relative variance is 4 / r, where a dense map of as many columns has 2 / r^2: on
    EfficientNet-Lite0 the 44,000 columns of r = 32 are worth 1,500 dense ones, and those of r = 64, 133,000, worth
    4,000. Good for coarse rankings of large data sets only. Up to r^2 numbers of a parameter are kept as they are.
    """

    def width(self, shapes: Shapes) -> int:  # noqa: D102 - see the base
        return sum(math.prod(self._sides(shape)) for shape in shapes.values())

    def apply(self, rows: Mapping[str, Tensor], shapes: Shapes) -> Tensor:  # noqa: D102 - see the base
        parts = []
        for position, (name, shape) in enumerate(shapes.items()):
            part = rows[name]
            sides, generator = self._sides(shape), self._generator(position)
            if math.prod(sides) < part.shape[1]:
                whole = part.view(len(part), shape[0], -1)
                left, right = (
                    self._directions(d, r, generator).to(part) for d, r in zip(whole.shape[1:], sides, strict=True)
                )
                part = (left.T @ (whole @ right)).flatten(1)
            parts.append(part)
        return torch.cat(parts, 1)

    def _sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        count, outputs = math.prod(shape), shape[0] if shape else 1
        if count <= self.size**2:
            return count, 1
        return min(outputs, self.size), min(count // outputs, self.size)

    def _directions(self, dimension: int, rank: int, generator: torch.Generator) -> Tensor:
        if rank == dimension:
            return torch.eye(dimension)
        # Orthonormal directions cost nothing more here than independent ones, and vary less.
        basis: Tensor = torch.linalg.qr(torch.randn(dimension, rank, generator=generator, dtype=torch.float64))[0]
        return basis * math.sqrt(dimension / rank)


def copies_of(sketch: Sketch, number: int) -> Iterator[Sketch]:
    """Draw independent sketches of one kind; side by side and over the root of their number they average its error.

    Args:
        sketch: The kind, the size of each, and the seed of the family.
        number: How many.

    Yields:
        Sketches with seeds of their own.
    """
    for k in range(number):
        yield type(sketch)(sketch.size, sketch.seed * number + k)
