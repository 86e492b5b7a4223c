import random

import numpy as np
import torch

from lqf_lightning.data.seeding import mix_seed, seeded


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_seed_repeats_the_draws_of_all_three_generators():
    with seeded(7):
        first = draw()
    with seeded(7):
        assert draw() == first
    with seeded(8):
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_generators_continue_as_if_nothing_had_been_drawn():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with seeded(1):
        draw()
    assert draw() == expected


def test_neighboring_seeds_do_not_collide():
    mixed = {mix_seed(seed, epoch, index) for seed in range(10) for epoch in range(10) for index in range(50)}
    assert len(mixed) == 5000
    assert max(mixed) < 2**63
