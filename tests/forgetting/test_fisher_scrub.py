import pytest
import torch

from lqf_lightning.forgetting.fisher_scrub import clear_rows, fisher_variance


def information(seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (3, 2, 2, 2), "norm.weight": (3,), "fc.weight": (3, 5), "fc.bias": (3,)}
    found = {name: torch.rand(shape, generator=draw, dtype=torch.float64) ** 8 for name, shape in shapes.items()}
    found["conv.weight"][1, 0] = 0.0  # nobody minds: the cap decides
    found["fc.weight"][2] = 0.0
    return found


def by_hand(found, name, position):
    head = name.startswith("fc")
    cap, factor = (1e2 if head else 1e3), (10 if head or name == "norm.weight" else 1)
    if found[name].dim() == 1:
        entries = [found[name][position]]
    else:
        entries = [found[name][(position[0], k, *position[2:])] for k in range(found[name].shape[1])]
    return factor * sum(1e-6 * min(1 / (float(f) + 1e-8), cap) for f in entries) / len(entries)


def test_every_weight_gets_the_capped_inverse_averaged_over_the_inputs_of_its_filter():
    found = information()
    variance = fisher_variance(found, head=["fc.weight", "fc.bias"])
    for name, own in variance.items():
        for position in torch.cartesian_prod(*(torch.arange(n) for n in own.shape)).reshape(own.numel(), -1).tolist():
            place = tuple(position)
            expected = by_hand(found, name, place if own.dim() > 1 else place[0])
            assert float(own[place]) == pytest.approx(expected, rel=1e-12)


def test_without_filters_every_weight_stands_for_itself_and_strength_scales_all():
    found = information()
    variance = fisher_variance(found, strength=3e-4, by_filter=False)
    expected = 3e-4 * (found["conv.weight"] + 1e-8).reciprocal().clamp(max=1e3)
    torch.testing.assert_close(variance["conv.weight"], expected, rtol=1e-12, atol=0)


def test_the_row_of_a_class_that_is_gone_is_wiped_and_nothing_else():
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(f.shape, generator=draw, dtype=torch.float64) for name, f in information().items()}
    variance = fisher_variance(information())
    new, narrowed = clear_rows(weights, variance, ["fc.weight", "fc.bias"], [1])
    for name in weights:
        stays = torch.ones(3, dtype=torch.bool)
        stays[1] = not name.startswith("fc")
        assert torch.equal(new[name][stays], weights[name][stays])
        assert torch.equal(narrowed[name][stays], variance[name][stays])
        assert bool((new[name][~stays] == 0).all())
        assert bool((narrowed[name][~stays] == 1e-4).all())
    assert bool(weights["fc.weight"][1].abs().min() > 0)  # the old ones are left alone


@pytest.mark.parametrize("option", ["strength", "cap", "head_cap", "factor"])
def test_numbers_that_are_not_positive_are_refused(option):
    with pytest.raises(ValueError, match=rf"Set \+\+callbacks\.scrub\.options\.{option}="):
        fisher_variance(information(), **{option: 0.0})


def test_negative_information_is_refused():
    with pytest.raises(ValueError, match=r"fc\.bias"):
        fisher_variance({"fc.bias": torch.tensor([-1.0])})
