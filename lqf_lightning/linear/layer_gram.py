r"""The part of one layer in the tangent kernel, from explicit rows or from inner products of inputs and cotangents."""

from torch import Tensor, nn

from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.linear.kernel_layers import KernelLayer
from lqf_lightning.linear.layer_records import Record
from lqf_lightning.linear.layer_rows import layer_vectors, outer_rows

_CHUNKS = 8  # of rows, of which only the upper triangle may be wanted
_COLUMNS = 2**17  # of rows, over which a product sums in the precision of the kernel


class LayerGram:
    """Adds inner products of gradients of one layer to a kernel.

    Args:
        layer: The layer, with its choices made.
        module: Its module; None for parameters without a known structure.
        form: Form of the kernel.
        scratch: Numbers that temporary results may take.
    """

    def __init__(self, layer: KernelLayer, module: nn.Module | None, form: KernelForm, scratch: int = 2**26) -> None:
        self.layer, self.module, self.form, self.scratch = layer, module, form, scratch

    def add_to(self, out: Tensor, left: Record, right: Record | None = None) -> None:
        """Add the inner products of two sets of samples.

        Args:
            out: Matrices (blocks, n * coupled, m * coupled), changed in place.
            left: n samples, which make the rows.
            right: m samples, which make the columns; None for the same samples, where only what lies on and above
                the diagonal is needed and the rest stays undefined.
        """
        if len(left.deltas) == 0 or (right is not None and len(right.deltas) == 0):
            return
        if self.form == "last_layer":
            self._features(out, left, right)
        elif self.layer.gram == "explicit":
            self._explicit(out, left, right)
        elif self.layer.positions == 1:
            self._pointwise(out, left, right)
        else:
            self._weighted(out, left, right)

    def _features(self, out: Tensor, left: Record, right: Record | None) -> None:
        vectors = self._vectors(left)[:, 0, 0]
        others = vectors if right is None else self._vectors(right)[:, 0, 0]
        out[0] += vectors @ others.T

    def _explicit(self, out: Tensor, left: Record, right: Record | None) -> None:
        samples, cotangents = left.deltas.shape[:2]
        samples += 0 if right is None else len(right.deltas)
        whole = self.layer.stop - self.layer.start
        step = self.layer.channels // self.layer.blocks if self.layer.blocks > 1 else 1
        room = self.scratch // (samples * cotangents * self.layer.width)
        size = whole if self.layer.rows else max(room // step * step, step)
        for start in range(0, whole, size):
            rows = self._shape_rows(self._rows(left, start, start + size))
            others = rows if right is None else self._shape_rows(self._rows(right, start, start + size))
            self._multiply(out, rows, others, right is None, self._scale(cotangents))

    def _multiply(self, out: Tensor, rows: Tensor, others: Tensor, upper: bool, scale: float) -> None:
        count = rows.shape[1]
        size = max(-(-count // _CHUNKS), 64)
        for at in range(0, rows.shape[2], _COLUMNS):
            part = slice(at, at + _COLUMNS)
            for start in range(0, count, size):
                first, chunk = start if upper else 0, slice(start, start + size)
                # Adding to the kernel inside of the product would round millions of small terms to its magnitude.
                products = rows[:, chunk, part] @ others[:, first:, part].mT
                out[:, chunk, first:].add_(products, alpha=scale)

    def _rows(self, record: Record, start: int, stop: int) -> Tensor:
        if self.layer.rows:
            return record.deltas
        stop = min(stop, self.layer.stop - self.layer.start)
        count, cotangents = record.deltas.shape[:2]
        rows = record.deltas.new_empty(count, cotangents, (stop - start) * self.layer.width)
        size = max(self.scratch // (4 * self.layer.blocks * self.layer.positions * self.layer.width), 1)
        for at in range(0, count, size):
            part = slice(at, at + size)
            vectors = self._vectors(record, part)
            rows[part] = outer_rows(self.layer, vectors, record.deltas[part], start, stop)
        return rows

    def _scale(self, cotangents: int) -> float:
        return 1 / cotangents if self.form == "trace" else 1.0

    def _shape_rows(self, rows: Tensor) -> Tensor:
        # (n, V, p) -> (blocks, n * coupled, features)
        if self.form == "full":
            return rows.flatten(0, 1).unsqueeze(0)
        return rows.transpose(0, 1) if self.form == "diagonal" else rows.flatten(1).unsqueeze(0)

    def _pointwise(self, out: Tensor, left: Record, right: Record | None) -> None:
        vectors, deltas = self._vectors(left)[:, 0, 0], self._shape_rows(left.deltas[..., 0])
        others, ends = vectors, deltas
        if right is not None:
            others, ends = self._vectors(right)[:, 0, 0], self._shape_rows(right.deltas[..., 0])
        coupled, scale = deltas.shape[1] // len(vectors), self._scale(left.deltas.shape[1])
        size = max(self.scratch // (4 * len(deltas) * ends.shape[1] * coupled), 1)
        for start in range(0, len(vectors), size):
            stop = min(start + size, len(vectors))
            first = start if right is None else 0
            products = deltas[:, start * coupled : stop * coupled] @ ends[:, first * coupled :].mT
            alike = vectors[start:stop] @ others[first:].T
            shape = (len(products), stop - start, coupled, -1, coupled)
            scaled = products.view(shape) * alike[:, None, :, None]
            out[:, start * coupled : stop * coupled, first * coupled :].add_(
                scaled.reshape(products.shape), alpha=scale
            )

    def _weighted(self, out: Tensor, left: Record, right: Record | None) -> None:
        ends, positions = left if right is None else right, self.layer.positions
        kept = positions * (self.layer.width + 2 * left.deltas.shape[1] * left.deltas.shape[2])
        size = max(self.scratch // (16 * kept), 1)
        wide = max(min(size, self.scratch // (4 * size * positions**2)), 1)
        for top in range(0, len(left.deltas), size):
            rows = slice(top, min(top + size, len(left.deltas)))
            vectors, deltas = self._vectors(left, rows)[:, 0].flatten(0, 1), self._stand(left.deltas[rows], False)
            for start in range(top if right is None else 0, len(ends.deltas), wide):
                columns = slice(start, start + wide)
                alike = vectors @ self._vectors(ends, columns)[:, 0].flatten(0, 1).T
                for place, end in enumerate(self._stand(ends.deltas[columns], True)):
                    near = alike[:, place * positions : (place + 1) * positions]
                    column = start + place
                    # On and above the diagonal only.
                    count = min(column + 1 - top, len(deltas)) if right is None else len(deltas)
                    products = self._contract(near[: count * positions] @ end, deltas[:count])
                    self._place(out, products, top, column)

    def _stand(self, deltas: Tensor, right: bool) -> Tensor:
        # (n, V, o, T): left ones (n, V, T o) and right ones (n, T, o V) if outputs couple, else (n, T, V o) both.
        if self.form != "full":
            return deltas.permute(0, 3, 1, 2).flatten(2)
        return deltas.permute(0, 3, 2, 1).flatten(2) if right else deltas.transpose(2, 3).flatten(2)

    def _contract(self, weighted: Tensor, deltas: Tensor) -> Tensor:
        # (n T, o V) and (n, V, T o) -> (n, V, V); (n T, V o) and (n, T, V o) -> (n, V)
        if self.form == "full":
            return deltas @ weighted.reshape(len(deltas), deltas.shape[2], -1)
        products = weighted.reshape(deltas.shape).mul_(deltas).sum(1)
        return products.view(len(products), -1, self.layer.stop - self.layer.start).sum(2)

    def _place(self, out: Tensor, products: Tensor, top: int, column: int) -> None:
        if self.form == "full":
            c = products.shape[1]
            out[0, top * c : (top + len(products)) * c, column * c : (column + 1) * c] += products.flatten(0, 1)
        else:
            summed = products.mean(1, keepdim=True) if self.form == "trace" else products
            out[:, top : top + len(products), column] += summed.T

    def _vectors(self, record: Record, part: slice = slice(None)) -> Tensor:
        if self.module is None:
            raise ValueError("rows of a parameter without a module cannot be formed again")
        return layer_vectors(self.layer, self.module, record.inputs[part], self.layer.positions)
