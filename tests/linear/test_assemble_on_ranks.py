from typing import Any

import pytest
import torch
from torch import Tensor

from linear.nets import build_net
from lqf_lightning.linear import current_reducer
from lqf_lightning.linear.assemble import KernelPair, assemble_kernel
from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.linear.linearized import LinearizedModel
from ranks import run_on_ranks

GROUPS = {
    "head": ["head.weight", "head.bias"],
    "tokens": ["pos_embed", "cls_token", "norm.weight"],
    "block": ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias", "blocks.1.norm2.bias"],
}
# Sample 0 is padding on several ranks; the last layout leaves a rank without anything, and one without others.
SHARDS: list[tuple[list[list[int]], list[list[int]]]] = [
    ([[4, 0, 3, 1, 2]], [[2, 1, 0]]),
    ([[3, 1, 4, 0], [2, 0]], [[1], [2, 0]]),
    ([[1, 0], [], [4, 0, 3, 2]], [[], [], [0, 2, 1]]),
]


def assemble(x: Tensor, train: list[list[int]], other: list[list[int]], **options: Any) -> KernelPair:
    reducer = current_reducer()
    mine, others = torch.tensor(train[reducer.rank]).long(), torch.tensor(other[reducer.rank]).long()
    model = LinearizedModel(build_net("transformer"), example=x)
    return assemble_kernel(
        model, GROUPS, list(x[mine].split(2)) if len(mine) else [], [x[others]] if len(others) else [],
        index=10 * mine, other_index=others, reducer=reducer, **options,
    )  # fmt: skip


def matrices(pair: KernelPair) -> list[Tensor]:
    assert pair.cross is not None
    return [*pair.train.groups.values(), *pair.cross.groups.values()]


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("shards", SHARDS)
def test_ranks_agree_with_a_single_process(
    form: KernelForm, shards: tuple[list[list[int]], list[list[int]]], x: Tensor
) -> None:
    expected = assemble(x, [[0, 1, 2, 3, 4]], [[0, 1, 2]], form=form)
    for got in run_on_ranks(len(shards[0]), lambda: assemble(x, *shards, form=form, budget=6000)):
        assert got.index.tolist() == [0, 10, 20, 30, 40]
        assert got.other_index.tolist() == [0, 1, 2]
        for a, b in zip(matrices(got), matrices(expected), strict=True):
            assert (a - b).norm() <= 1e-10 * b.norm()
        assert all(torch.equal(k, k.mT) for k in got.train.groups.values())


def test_the_last_layer_alone_on_ranks(x: Tensor) -> None:
    def head(train: list[list[int]], other: list[list[int]]) -> list[Tensor]:
        reducer = current_reducer()
        mine, others = torch.tensor(train[reducer.rank]).long(), torch.tensor(other[reducer.rank]).long()
        model = LinearizedModel(build_net("transformer"), example=x)
        batches = [x[mine]] if len(mine) else []
        pair = assemble_kernel(
            model, {"head": GROUPS["head"]}, batches, [x[others]] if len(others) else [], form="last_layer",
            index=mine, other_index=others, reducer=reducer,
        )  # fmt: skip
        return matrices(pair)

    expected = head([[0, 1, 2, 3, 4]], [[0, 1, 2]])
    for got in run_on_ranks(3, head, *SHARDS[2]):
        assert all((a - b).norm() <= 1e-10 * b.norm() for a, b in zip(got, expected, strict=True))


class StopError(Exception):
    pass


def test_the_store_of_the_first_rank_is_enough(x: Tensor) -> None:
    expected = matrices(assemble(x, [[0, 1, 2, 3, 4]], [[0, 1, 2]]))

    def resume() -> tuple[list[Tensor], int, int]:
        first = current_reducer().rank == 0
        store: dict[str, Tensor] | None = {} if first else None

        def stop(items: Any) -> Any:
            for item in items:
                if getattr(item, "group", None) == "head":
                    raise StopError
                yield item

        with pytest.raises(StopError):
            assemble(x, *SHARDS[1], store=store, watch=stop)
        kept, layers = len(store or {}), 0

        def count(items: Any) -> Any:
            nonlocal layers
            layers += sum(hasattr(item, "group") for item in items)
            return iter(items)

        return matrices(assemble(x, *SHARDS[1], store=store, watch=count)), kept, layers

    results = run_on_ranks(2, resume)
    assert [kept for _, kept, _ in results] == [4, 0]
    for got, _, layers in results:
        assert layers == 1
        assert all((a - b).norm() <= 1e-10 * b.norm() for a, b in zip(got, expected, strict=True))


def test_several_processes_need_an_index(x: Tensor) -> None:
    def call() -> str:
        model = LinearizedModel(build_net("residual"), example=x)
        with pytest.raises(ValueError, match="2 processes share the samples"):
            assemble_kernel(model, {"head": ["6.weight"]}, [x], reducer=current_reducer())
        return "refused"

    assert run_on_ranks(2, call) == ["refused", "refused"]
