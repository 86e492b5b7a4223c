"""The Jacobian of a linearized network as an operator: `J v` and `J^T r`, batch by batch, never as a matrix.

Work is counted in evaluations of the convolutions: `J v` takes 3, `J^T r` takes 1 and 2 per right-hand side, and the
Gauss-Newton product `J^T A (J v - s)` takes 5 in forward mode, where the two in turn would take 6. Sums over batches
are kept in double precision; sums over ranks are the caller's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lqf_lightning.linear.folded_jacobian import Direction, FoldedJacobian, Transform, exactly, ordinary, widen
from lqf_lightning.linear.folded_network import Tensors
from lqf_lightning.linear.linearized import LinearizedModel


class StreamedJacobian:
    r"""The Jacobian of the samples of this rank, `J` of `n * C` rows, that passes over the data for every product.

    Directions that are applied in the same call share the pass over the data; several right-hand sides of `pull` share
    the forward evaluation too. Results have the type of the parameters, and `pull` gives no graph.

    Args:
        model: The linearized model; its `dw` plays no part and is left alone.
        batches: Inputs (B, ...) of this rank, in an order that is the same every time.
        watch: Wraps the batches, for a progress bar.

    Raises:
        TypeError: `batches` can be walked through only once.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
        >>> model = LinearizedModel(torch.nn.Linear(2, 1, bias=False), example=x)
        >>> jacobian = StreamedJacobian(model, x.split(2))
        >>> jacobian.push({"weight": torch.tensor([[1.0, -1.0]])})[0].tolist()
        [[-1.0], [-1.0], [3.0]]
        >>> jacobian.pull(torch.ones(3, 1))[0]["weight"].tolist()
        [[4.0, 3.0]]
    """

    def __init__(
        self,
        model: LinearizedModel,
        batches: Iterable[Tensor],
        *,
        watch: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    ) -> None:
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches are a {type(batches).__name__}, which is spent after one pass, and every product is a pass; "
                "give a list or a data loader without shuffling"
            )
        self.model, self.batches, self.watch = model, batches, watch

    def initial(self) -> Tensor:
        """Evaluate the network at `w0`.

        Returns:
            `f0` (n, C) of this rank's samples.
        """
        parts = []
        for x, _ in self._stream():
            with exactly(x.device, False):
                parts.append(widen(self.model.folded(x).value(x)))
        return torch.cat(parts)

    def push(self, *directions: Direction) -> list[Tensor]:
        """Apply J.

        Args:
            *directions: Movements v by parameter name; what is left out does not move.

        Returns:
            `J v` (n, C) for every direction.
        """
        parts: list[Tensor] = []
        jacobian: FoldedJacobian | None = None
        tangents: list[Tensors] = []
        for x, _ in self._stream():
            with exactly(x.device, False):
                if jacobian is None:
                    jacobian = FoldedJacobian(self.model, x)
                    tangents = jacobian.fold(directions)
                parts.append(torch.stack([widen(jacobian.push(x, tangent)) for tangent in tangents]))
        return list(torch.cat(parts, 1))

    def pull(self, *rows: Tensor) -> list[Tensors]:
        """Apply the transpose of J.

        Args:
            *rows: Right-hand sides r (n, C).

        Returns:
            `J^T r`, summed over this rank's samples, by parameter name, for every right-hand side.

        Raises:
            ValueError: The right-hand sides have another number of rows than there are samples.
        """
        counts, end = {len(row) for row in rows}, 0
        jacobian: FoldedJacobian | None = None
        for x, part in self._stream():
            end = part.stop
            if min(counts) < end:
                raise ValueError(f"right-hand sides have {min(counts)} rows, fewer than there are samples")
            with exactly(x.device, True):
                jacobian = jacobian or FoldedJacobian(self.model, x)
                jacobian.pull(x, [ordinary(row[part]) for row in rows])
        if max(counts) > end:
            raise ValueError(f"right-hand sides have {max(counts)} rows, more than the {end} samples")
        return [] if jacobian is None else jacobian.pulled()

    def push_pull(
        self, *directions: Direction, weight: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensors]]:
        r"""Apply the weighted Gauss-Newton matrix in one pass: :math:`J^T A (J v - s)`.

        Args:
            *directions: Movements v by parameter name; what is left out does not move. All of them are evaluated
                before the first is pulled back, so memory grows with their number T.
            weight: Sample weights, the diagonal of A (n,); None means 1.
            shift: s (n, C), or (T, n, C) if it differs between the directions; None means 0.

        Returns:
            `J v` (n, C) for every direction, and `J^T A (J v - s)`, summed over this rank's samples.
        """
        parts: list[Tensor] = []
        jacobian: FoldedJacobian | None = None
        tangents: list[Tensors] = []
        for x, part in self._stream():

            def transform(rows: list[Tensor], part: slice = part) -> list[Tensor]:
                parts.append(torch.stack(rows))
                return _weigh(parts[-1], part, weight, shift)

            with exactly(x.device, True):
                if jacobian is None:
                    jacobian = FoldedJacobian(self.model, x)
                    tangents = jacobian.fold(directions, whole=True)
                jacobian.push_pull(x, tangents, transform)
        return list(torch.cat(parts, 1)), [] if jacobian is None else jacobian.pulled()

    def _stream(self) -> Iterator[tuple[Tensor, slice]]:
        end = 0
        for x in self.watch(self.batches):
            start, end = end, end + len(x)
            yield _place(self.model, x), slice(start, end)
        if end == 0:
            raise ValueError("this rank has no sample to take a Jacobian of: use fewer ranks than samples")


def push_batch(model: LinearizedModel, x: Tensor, directions: Sequence[Direction]) -> list[Tensor]:
    """Apply the Jacobian of one batch.

    Args:
        model: The linearized model.
        x: Input (B, ...).
        directions: Movements v by parameter name; what is left out does not move.

    Returns:
        `J v` (B, C) for every direction, without a graph.
    """
    return StreamedJacobian(model, [x]).push(*directions)


def pull_batch(model: LinearizedModel, x: Tensor, rows: Sequence[Tensor]) -> list[Tensors]:
    """Apply the transposed Jacobian of one batch.

    Args:
        model: The linearized model.
        x: Input (B, ...).
        rows: Right-hand sides r (B, C), which share the forward evaluation.

    Returns:
        `J^T r`, summed over the batch, by parameter name, for every right-hand side.
    """
    return StreamedJacobian(model, [x]).pull(*rows)


def push_pull_batch(
    model: LinearizedModel, x: Tensor, directions: Sequence[Direction], transform: Transform
) -> tuple[list[Tensor], list[Tensors]]:
    """Apply the Jacobian of one batch, change the rows, and apply its transpose, from one evaluation.

    Args:
        model: The linearized model.
        x: Input (B, ...).
        directions: Movements v by parameter name; what is left out does not move.
        transform: Takes the rows `J v` (B, C) of all directions, gives as many right-hand sides r.

    Returns:
        The rows `J v`, and `J^T r` by parameter name.
    """
    seen: list[Tensor] = []

    def noted(rows: list[Tensor]) -> list[Tensor]:
        seen.extend(rows)
        return transform(rows)

    x = _place(model, x)
    with exactly(x.device, True):
        jacobian = FoldedJacobian(model, x)
        jacobian.push_pull(x, jacobian.fold(directions, whole=True), noted)
        return seen, jacobian.pulled()


def _weigh(rows: Tensor, part: slice, weight: Tensor | None, shift: Tensor | None) -> list[Tensor]:
    if shift is not None:
        rows = rows - ordinary(shift)[..., part, :].to(rows)
    return list(rows if weight is None else rows * ordinary(weight)[part, None].to(rows))


def _place(model: LinearizedModel, x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return ordinary(x).to(next(iter(model.deltas.values())).device)
