import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lqf_lightning.teachers.contrast import info_nce
from lqf_lightning.teachers.key_queue import KeyQueue
from ranks import run_on_ranks

SIZE, WIDTH, GLOBAL = 24, 3, 6


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Keys and labels of all ranks together, none of which comes twice."""
    keys = torch.arange(GLOBAL * WIDTH).view(GLOBAL, WIDTH) + 1000.0 * (step + 1)
    return keys, torch.arange(GLOBAL) + 10 * step


def share(rows: Tensor) -> Tensor:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rows.chunk(world_size)[rank]


def filled(steps: int, *, queue: KeyQueue | None = None, first: int = 0) -> KeyQueue:
    queue = queue or KeyQueue(SIZE, WIDTH, seed=5)
    for step in range(first, first + steps):
        keys, labels = batch(step)
        queue.enqueue(share(keys), share(labels))
    return queue


def expected(steps: int) -> tuple[Tensor, Tensor, int]:
    """The last K keys, by hand: row r of the ring holds the last key whose number is r modulo K."""
    keys, labels = KeyQueue(SIZE, WIDTH, seed=5).keys.clone(), torch.full((SIZE,), -1)
    for step in range(steps):
        for row, (key, label) in enumerate(zip(*batch(step), strict=True)):
            keys[(step * GLOBAL + row) % SIZE], labels[(step * GLOBAL + row) % SIZE] = key, label
    return keys, labels, steps * GLOBAL % SIZE


def contents(queue: KeyQueue) -> tuple[Tensor, Tensor, int]:
    return queue.keys, queue.labels, queue.position


def assert_same(got: tuple[Tensor, Tensor, int], wanted: tuple[Tensor, Tensor, int]) -> None:
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert got[2] == wanted[2]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_holds_the_last_keys_by_step_rank_and_row(world_size: int) -> None:
    for steps in (1, 3, 6):
        for got in run_on_ranks(world_size, lambda steps=steps: contents(filled(steps))):
            assert_same(got, expected(steps))


def test_noise_is_gone_after_one_round_and_not_before() -> None:
    noise = KeyQueue(SIZE, WIDTH, seed=5).keys

    def left(steps: int) -> int:
        return int(torch.isin(noise, filled(steps).keys).all(1).sum())

    assert [left(steps) for steps in range(SIZE // GLOBAL + 1)] == [24, 18, 12, 6, 0]


def test_noise_is_of_length_one_and_depends_on_nothing_but_the_seed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = KeyQueue(1000, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(KeyQueue(1000, 8, seed=3).keys, one.keys)
    assert not torch.equal(KeyQueue(1000, 8, seed=4).keys, one.keys)
    torch.testing.assert_close(one.keys.norm(dim=1), torch.ones(1000))
    # Directions are even: the mean of n unit vectors of D numbers has a norm of about 1 / sqrt(n).
    assert one.keys.mean(0).norm() < 3 / 1000**0.5
    assert one.labels.tolist() == [-1] * 1000


def test_labels_that_are_not_given_are_unknown_and_overwrite_known_ones() -> None:
    queue = filled(4)
    assert (queue.labels >= 0).all()
    queue.enqueue(batch(4)[0])
    assert queue.labels[:GLOBAL].tolist() == [-1] * GLOBAL
    assert (queue.labels[GLOBAL:] >= 0).all()


def test_tensors_stay_where_they_are_and_remember_no_gradient() -> None:
    queue = KeyQueue(SIZE, WIDTH)
    places = queue.keys.data_ptr(), queue.labels.data_ptr()
    keys = batch(0)[0].requires_grad_() * 2
    queue.enqueue(keys)
    assert (queue.keys.data_ptr(), queue.labels.data_ptr()) == places
    assert not queue.keys.requires_grad
    assert torch.equal(queue.keys[:GLOBAL], 2 * batch(0)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keys_of_any_precision_are_stored_in_single_precision(dtype: torch.dtype) -> None:
    queue, keys = KeyQueue(4, 2), torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=dtype)
    queue.enqueue(keys)
    assert queue.keys.dtype == torch.float32
    assert torch.equal(queue.keys[:2], keys.float())


def test_known_keys_are_those_that_were_put_in() -> None:
    queue = KeyQueue(6, 2)
    assert queue.known()[0].shape == (0, 2)
    keys = torch.arange(16.0).view(8, 2)
    for step in range(4):
        queue.enqueue(keys[2 * step : 2 * step + 2], torch.tensor([2 * step, 2 * step + 1]))
        expected = range(2 * step + 2) if step < 3 else [6, 7, 2, 3, 4, 5]
        assert queue.known()[0].tolist() == [keys[row].tolist() for row in expected]
        assert queue.known()[1].tolist() == list(expected)
        again = KeyQueue(6, 2, seed=1)
        again.load_state_dict(queue.state_dict())
        assert (
            (again.position, again.filled)
            == (queue.position, queue.filled)
            == ((2 * step + 2) % 6, min(6, 2 * step + 2))
        )


def test_keys_stay_in_single_precision_when_their_owner_is_narrowed() -> None:
    owner = torch.nn.Sequential(KeyQueue(4, 2)).bfloat16()
    assert owner[0].keys.dtype == torch.float32
    assert owner.double()[0].keys.dtype == torch.float64


def test_a_copy_of_the_state_goes_on_at_the_position() -> None:
    queue = KeyQueue(SIZE, WIDTH, seed=9)
    queue.load_state_dict(filled(3).state_dict())
    assert_same(contents(filled(4, queue=queue, first=3)), expected(7))


def test_what_two_ranks_saved_one_rank_loads(tmp_path) -> None:
    first, second = run_on_ranks(2, lambda: filled(5).state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.save(first, tmp_path / "queue.ckpt")
    queue = KeyQueue(SIZE, WIDTH)
    queue.load_state_dict(torch.load(tmp_path / "queue.ckpt", weights_only=True))
    assert_same(contents(filled(2, queue=queue, first=5)), expected(7))


def test_a_smaller_batch_after_a_resumption_may_reach_over_the_end() -> None:
    queue = KeyQueue(6, 1)
    queue.enqueue(torch.tensor([[1.0], [2.0]]))
    queue.enqueue(torch.tensor([[3.0], [4.0]]))
    queue.enqueue(torch.tensor([[5.0], [6.0], [7.0]]), torch.tensor([5, 6, 7]))
    assert queue.keys[:, 0].tolist() == [7.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert queue.labels.tolist() == [7, -1, -1, -1, 5, 6]
    assert queue.position == 1


@pytest.mark.parametrize(("number", "fitting"), [(5, "20 or 25"), (9, "18 or 27"), (48, "48"), (0, "24")])
def test_batches_that_leave_a_remainder_are_refused_with_the_remedy(number: int, fitting: str) -> None:
    with pytest.raises(ValueError, match=rf"24 keys.*the {number} samples.*queue_size={fitting}, or a data.batch_size"):
        KeyQueue(SIZE, WIDTH).refuse_batch(number)


def test_the_batch_that_counts_is_that_of_all_ranks() -> None:
    def refused() -> str:
        queue = KeyQueue(12, 1)
        queue.refuse_batch(4)
        with pytest.raises(ValueError, match="the 8 samples") as error:
            queue.enqueue(torch.zeros(4, 1))
        assert queue.position == 0
        return str(error.value)

    first, second = run_on_ranks(2, refused)
    assert first == second


def test_shapes_are_checked() -> None:
    queue = KeyQueue(4, 2)
    with pytest.raises(ValueError, match=r"shape \(B, 2\), got \(2, 3\)"):
        queue.enqueue(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(2,\), got \(3,\)"):
        queue.enqueue(torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64))
    for size, width in ((0, 2), (4, 0)):
        with pytest.raises(ValueError, match=r"Set method.queue_size="):
            KeyQueue(size, width)


def test_the_queue_may_move_on_before_the_backward_pass() -> None:
    def gradient(*, move_on: bool) -> Tensor:
        queue, query = filled(1), torch.tensor([[0.6, 0.8, 0.0]], requires_grad=True)
        loss = info_nce(query, torch.tensor([[1.0, 0.0, 0.0]]), queue.keys / 1000, temperature=0.5)
        loss = loss + info_nce(query, torch.tensor([[1.0, 0.0, 0.0]]), queue.keys, temperature=500.0)
        if move_on:
            queue.enqueue(torch.zeros(GLOBAL, WIDTH))
        loss.backward()
        assert query.grad is not None
        return query.grad

    assert torch.equal(gradient(move_on=True), gradient(move_on=False))


def test_distributed_training_does_not_send_the_queue() -> None:
    """DDP compares or sends buffers of the names that it does not ignore: rank 1 would get what rank 0 holds."""

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queue, self.layer = KeyQueue(4, 1), nn.Linear(1, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs)

    def kept(ignore: bool) -> bool:
        method = Method()
        if ignore:
            names = [f"queue.{name}" for name in KeyQueue.BUFFERS]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, names)
        wrapped = nn.parallel.DistributedDataParallel(method)
        method.queue.keys.fill_(dist.get_rank())
        method.queue.labels.fill_(dist.get_rank())
        wrapped(torch.ones(1, 1)).sum().backward()
        held = torch.cat([method.queue.keys.flatten(), method.queue.labels]).unique().tolist()
        return held == [dist.get_rank()]

    assert run_on_ranks(2, kept, True) == [True, True]
    assert run_on_ranks(2, kept, False) == [True, False]
