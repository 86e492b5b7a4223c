import math

import pytest
import torch

from lqf_lightning.methods.schedule import cosine, multistep


def rates(schedule, total, *, lr=(1.0,), **options):
    """Rates that the steps of a run use, one list per parameter group."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in lr]
    optimizer = torch.optim.SGD(groups)
    scheduler = schedule(optimizer, total, **options)
    used = []
    for _ in range(total):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [list(rate) for rate in zip(*used, strict=True)]


def test_cosine_rises_for_its_share_of_the_steps_then_falls_to_zero():
    (used,) = rates(cosine, 8, lr=(2.0,), warmup=0.25)
    falling = [1 + math.cos(math.pi * k / 6) for k in range(6)]
    assert used == pytest.approx([1.0, 2.0, *falling])
    assert falling[3] == pytest.approx(1.0)


def test_cosine_without_warmup_starts_at_the_peak_and_would_end_at_zero():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = cosine(optimizer, 4, warmup=0.0)
    used = []
    for _ in range(5):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    half = math.sqrt(0.5) / 2
    assert used == pytest.approx([1.0, 0.5 + half, 0.5, 0.5 - half, 0.0])


def test_multistep_falls_at_its_milestones():
    (used,) = rates(multistep, 10, lr=(3.0,), warmup=0.2, milestones=[0.5, 0.8], gamma=0.1)
    assert used == pytest.approx([1.5, 3.0, 3.0, 3.0, 3.0, 0.3, 0.3, 0.3, 0.03, 0.03])


def test_a_milestone_is_never_late_by_rounding():
    for percent in range(1, 100):
        (used,) = rates(multistep, 100, milestones=[float(f"0.{percent:02d}")], gamma=0.5)
        assert used == [1.0] * percent + [0.5] * (100 - percent)


@pytest.mark.parametrize("schedule", [cosine, multistep])
def test_ratios_of_groups_stay(schedule):
    first, second = rates(schedule, 20, lr=(0.4, 0.1), warmup=0.1)
    assert first == pytest.approx([4 * rate for rate in second])
    assert min(first) < 0.1 * max(first)


@pytest.mark.parametrize("schedule", [cosine, multistep])
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_very_short_runs_train(schedule, total, warmup):
    (used,) = rates(schedule, total, warmup=warmup)
    assert all(0 < rate <= 1 for rate in used)


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 5])
@pytest.mark.parametrize("schedule", [cosine, multistep])
def test_warmup_outside_its_range_names_the_override(schedule, warmup):
    with pytest.raises(ValueError, match=rf"got {warmup}.*method\.scheduler\.warmup=0\.05"):
        rates(schedule, 10, warmup=warmup)


@pytest.mark.parametrize("milestones", [[0.5, 1.0], [0.0], [25, 40]])
def test_milestones_outside_their_range_name_the_override(milestones):
    with pytest.raises(ValueError, match=r"got \[.*method\.scheduler\.milestones=\[0\.5,0\.8\]"):
        rates(multistep, 10, milestones=milestones)
