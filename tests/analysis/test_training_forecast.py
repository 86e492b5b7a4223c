import pytest
import torch

from lqf_lightning.analysis.training_forecast import TrainingForecast
from lqf_lightning.data.sampler import TrainingSampler
from lqf_lightning.linear import Kernel
from lqf_lightning.linear.output_loss import CrossEntropyOutputLoss, SquaredOutputLoss
from lqf_lightning.linear.training_curve import TrainingGroup, training_curve
from lqf_lightning.linear.training_rule import TrainingRule

SAMPLES, OUTPUTS = 9, 3


def build(kind="squared", batch=4, form="full", world=1):
    draw = torch.Generator().manual_seed(0)
    rows = 0.3 * torch.randn(SAMPLES, OUTPUTS, 40, generator=draw, dtype=torch.float64)
    blocks = (rows.flatten(0, 1) @ rows.flatten(0, 1).T).unsqueeze(0)
    if form == "trace":
        blocks = torch.einsum("icp,jcp->ij", rows, rows).unsqueeze(0) / OUTPUTS
    label = torch.arange(SAMPLES) % OUTPUTS
    weight = torch.linspace(0.5, 2, SAMPLES, dtype=torch.float64)
    target = torch.nn.functional.one_hot(label, OUTPUTS).double()
    loss = SquaredOutputLoss(target, weight) if kind == "squared" else CrossEntropyOutputLoss(label, weight)
    origin = torch.randn(SAMPLES, OUTPUTS, generator=draw, dtype=torch.float64)
    sampler = TrainingSampler(SAMPLES, 3, world_size=world, batch_size=batch // world)
    places = torch.randperm(SAMPLES, generator=draw)
    return TrainingForecast(
        initial=torch.randn(SAMPLES, OUTPUTS, generator=draw, dtype=torch.float64), loss=loss,
        kernel=Kernel({"all": blocks}, OUTPUTS, form), groups={"all": TrainingGroup(1.0, 0.1, origin)},
        rule=TrainingRule(torch.full((12,), 0.1, dtype=torch.float64), 0.5), sampler=sampler, places=places,
        epoch=-(-SAMPLES // batch), seconds=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
def test_the_curve_takes_the_samples_in_the_order_of_the_run(world):
    forecast = build(world=world)
    ranks = [TrainingSampler(SAMPLES, 3, rank=r, world_size=world, batch_size=4 // world) for r in range(world)]
    batches = []
    for epoch in range(4):
        orders = []
        for rank in ranks:
            rank.set_epoch(epoch)
            orders.append([position for _, position in rank])
        for step in range(3):
            part = slice(step * 4 // world, (step + 1) * 4 // world)
            batches.append(forecast.places[torch.tensor([p for order in orders for p in order[part]])])
    expected = training_curve(
        forecast.kernel, forecast.initial, forecast.loss, forecast.rule, groups=forecast.groups, batches=batches
    )
    torch.testing.assert_close(forecast.curve().loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(forecast.curve().batch_loss, expected.batch_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["squared", "cross_entropy"])
@pytest.mark.parametrize("form", ["full", "trace"])
def test_half_of_a_run_is_the_run_of_a_model_that_never_heard_of_the_other_half(kind, form):
    # With batches of all samples: weights of 0 silence the others, and the mean is over fewer.
    whole = build(kind, batch=SAMPLES, form=form)
    half = whole.half()
    kept = [int((whole.initial == row).all(1).nonzero()) for row in half.initial]
    assert len(set(kept)) == SAMPLES // 2
    weight = torch.zeros(SAMPLES, dtype=torch.float64)
    weight[kept] = whole.loss.weight[kept] * SAMPLES / (SAMPLES // 2)
    loss = type(whole.loss)(whole.loss.target if kind == "squared" else whole.loss.label, weight)
    expected = training_curve(whole.kernel, whole.initial, loss, whole.rule, groups=whole.groups)
    torch.testing.assert_close(half.curve().loss, expected.loss, rtol=1e-10, atol=0)


def test_half_of_one_sample_is_refused():
    forecast = build()
    lonely = TrainingForecast(**{**vars(forecast), "initial": forecast.initial[:1]})
    with pytest.raises(ValueError, match="max_samples=200"):
        lonely.half()
