import pytest

from lqf_lightning.methods.frozen_parts import keep_frozen_parts_in_eval
from methods.tensors import build_backbone

EVERY = {"", "conv1", "bn1", "act1", "conv2", "bn2", "act2", "drop", "pool", "flat", "fc"}


@pytest.mark.parametrize(
    ("frozen", "batch_norm_frozen", "in_eval"),
    [
        ((), False, set()),
        ((), True, {"bn1", "bn2"}),
        (("conv1", "bn1"), False, {"conv1", "bn1"}),
        (("conv1", "bn1", "fc"), True, {"conv1", "bn1", "bn2", "fc"}),
        (("conv1", "bn1", "conv2", "bn2", "fc"), False, {"", "conv1", "bn1", "conv2", "bn2", "fc"}),
    ],
)
def test_parts_whose_weights_all_stay_are_in_eval_mode(frozen, batch_norm_frozen, in_eval):
    model = build_backbone().model.train()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    keep_frozen_parts_in_eval(model, batch_norm_frozen)
    expected = EVERY if "" in in_eval else in_eval
    assert {name for name, module in model.named_modules() if not module.training} == expected


def test_a_part_with_one_weight_that_trains_stays_in_training_mode():
    model = build_backbone().model.train()
    model.bn1.weight.requires_grad_(False)
    keep_frozen_parts_in_eval(model)
    assert model.bn1.training
