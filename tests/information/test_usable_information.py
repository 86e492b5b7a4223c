import math

import pytest
import torch
import torch.nn.functional as F

from lqf_lightning.information.linear_decoder import fit_linear_decoder
from lqf_lightning.information.mlp_decoder import fit_mlp_decoder
from lqf_lightning.information.usable_information import draw_parts, usable_information

DECODERS = ["linear", "mlp", "mlp2"]
# A decoder that is right almost always still pays for its doubt: 1e-7 of penalty, or where Adam stopped.
DOUBT = {"linear": 1e-3, "mlp": 0.02, "mlp2": 0.02}


def thirds(number):
    """Three parts that see the same samples in the same order."""
    return tuple(torch.arange(3 * number).split(number))


def repeated(features, label):
    return features.double().repeat(3, 1), label.repeat(3), thirds(len(label))


def bits(share):
    share = torch.as_tensor(share, dtype=torch.float64)
    return -float((share * share.log2()).sum())


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_representation_that_never_changes_tells_nothing(decoder):
    label = torch.tensor([0, 0, 0, 1, 2, 2]).repeat(5)
    found = usable_information(*repeated(torch.full((30, 4), 0.1), label), decoder=decoder)
    assert (found.bits, found.low, found.high, found.control) == (0, 0, 0, 0)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("shares", [(10, 10), (20, 10, 2), (5, 5, 5, 5)])
def test_the_variable_itself_tells_all_there_is_to_know(decoder, shares):
    label = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    found = usable_information(*repeated(F.one_hot(label), label), decoder=decoder)
    # One sample spread evenly over the values is part of the frequencies.
    n, k = sum(shares), len(shares)
    frequencies = torch.tensor([(share + 1 / k) / (n + 1) for share in shares])
    expected = -sum(share / n * math.log2(p) for share, p in zip(shares, frequencies.tolist(), strict=True))
    assert found.entropy == pytest.approx(expected, rel=1e-6)
    assert found.entropy - DOUBT[decoder] < found.bits <= found.entropy
    assert found.share == pytest.approx(found.bits / found.entropy)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_fair_bit_that_is_flipped_one_time_in_ten(decoder):
    bit = torch.tensor([0] * 50 + [1] * 50)
    seen = torch.where(torch.arange(100) % 10 == 0, 1 - bit, bit)
    found = usable_information(*repeated(seen[:, None], bit), decoder=decoder)
    assert found.bits == pytest.approx(1 - bits([0.1, 0.9]), abs=1e-4)
    assert found.entropy == 1
    # By sample: log2 of twice the probability of what was seen.
    wanted = torch.where(seen == bit, math.log2(1.8), math.log2(0.2))
    assert torch.allclose(found.pointwise, wanted.double(), atol=5e-3)
    assert found.pointwise.mean().item() == pytest.approx(found.bits)


def test_a_linear_decoder_cannot_tell_what_needs_two_features_at_once():
    corners = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(20, 1)
    parity = corners.sum(1) % 2
    found = {d: usable_information(*repeated(corners, parity), decoder=d).bits for d in DECODERS}
    assert found["linear"] == pytest.approx(0, abs=1e-6)
    assert found["mlp"] > 0.9
    assert found["mlp2"] > 0.9


def noise(seed, number=240, width=60, classes=3):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (number,), generator=generator)
    return torch.randn(number, width, generator=generator), label


@pytest.mark.parametrize("decoder", ["linear", "mlp"])
def test_noise_tells_nothing_about_samples_that_were_not_fitted(decoder):
    values = [usable_information(*noise(seed), draw_parts(240, seed=seed), decoder=decoder).bits for seed in range(6)]
    # Choosing among two dozen decoders on 60 samples may miss by chance, which costs bits rather than brings any.
    assert -0.2 < sum(values) / len(values) < 0.02


def test_shuffled_labels_tell_nothing_where_labels_tell_much():
    features, label = noise(0, width=10)
    features[torch.arange(240), label] += 4
    for decoder in ("linear", "mlp"):
        found = usable_information(features, label, draw_parts(240), decoder=decoder)
        assert found.bits > 1
        assert -0.2 < found.control < 0.05


def test_fitted_chosen_and_judged_samples_are_kept_apart():
    """Labels of the judged part alone are wrong: an estimate that had used them would not be negative."""
    features, label = repeated(torch.tensor([[0], [1]]).repeat(20, 1), torch.tensor([0, 1]).repeat(20))[:2]
    parts = thirds(40)
    label[parts[2]] = 1 - label[parts[2]]
    assert usable_information(features, label, parts).bits < -1
    # Nor are those of the choosing part fitted: it then prefers to know nothing.
    label[parts[1]] = 1 - label[parts[1]]
    assert usable_information(features, label, parts).bits == 0


@pytest.mark.parametrize("decoder", ["linear", "mlp"])
def test_judged_samples_have_no_part_in_the_decoder(decoder):
    features, label = noise(8, width=5)
    features[torch.arange(240), label] += 2
    parts = draw_parts(240)
    wanted = usable_information(features, label, parts, decoder=decoder).pointwise
    features[parts[2][0]] *= 1e4
    found = usable_information(features, label, parts, decoder=decoder).pointwise
    assert torch.allclose(found[1:], wanted[1:], rtol=1e-9, atol=1e-12)


def test_scale_shift_and_constant_features_do_not_matter():
    features, label = noise(1, width=5)
    features[torch.arange(240), label] += 1
    parts = draw_parts(240)
    wanted = usable_information(features, label, parts)
    other = torch.cat([features * torch.tensor([1.0, 10, 1e-3, 1e4, 5]) + 7, torch.full((240, 2), 3e4)], 1)
    found = usable_information(other, label, parts)
    assert found.bits == pytest.approx(wanted.bits, rel=1e-3)


def test_values_missing_where_decoders_are_fitted_are_not_impossible():
    features, label = noise(2, number=60, width=4)
    parts = draw_parts(60)
    label[parts[0]] = label[parts[0]].clamp_max(1)
    found = usable_information(features, label, parts)
    assert math.isfinite(found.bits)
    assert math.isfinite(found.entropy)


def test_the_interval_is_that_of_the_mean():
    features, label = noise(3, number=4000, width=3)
    features[torch.arange(4000), label] += 1
    found = usable_information(features, label, draw_parts(4000))
    error = float(found.pointwise.std()) / math.sqrt(len(found.pointwise))
    # Quantiles of 2000 means of 1000 samples: within a tenth of the standard error.
    assert found.low == pytest.approx(found.bits - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.bits + 1.96 * error, abs=0.15 * error)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_same_input_gives_the_same_numbers_and_leaves_chance_alone(decoder):
    features, label = noise(4)
    before = torch.get_rng_state()
    with torch.inference_mode():
        one = usable_information(features * 1, label, draw_parts(240), decoder=decoder)
    two = usable_information(features, label, draw_parts(240), decoder=decoder)
    assert torch.equal(before, torch.get_rng_state())
    assert (one.bits, one.low, one.high, one.control) == (two.bits, two.low, two.high, two.control)


@pytest.mark.parametrize("width", [6, 90])
@pytest.mark.parametrize("ridge", [1e-1, 1e-4])
def test_the_linear_decoder_is_the_minimum(width, ridge):
    features, label = noise(5, number=60, width=width)
    rows = features.double() - features.double().mean(0)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    decoder = fit_linear_decoder((rows, label), (rows, label), prior, ridges=(ridge,))
    assert decoder.ridge == ridge
    weight, bias = decoder.weight.clone().requires_grad_(), decoder.bias.clone().requires_grad_()
    penalty = 0.5 * ridge * (weight.square().sum() + bias.square().sum())
    loss = F.cross_entropy(prior + rows @ weight + bias, label) + penalty
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-6
    assert torch.allclose(decoder(rows), F.log_softmax(prior + rows @ weight + bias, 1))


def test_a_network_that_only_gets_worse_stays_the_prior():
    features, label = noise(6)
    prior = torch.full((3,), 1 / 3).double().log()
    wrong = (label + 1) % 3
    features = F.one_hot(label).double()
    decoder = fit_mlp_decoder((features, label), (features, wrong), prior)
    assert torch.allclose(decoder(features), prior.expand(240, 3))


def test_parts_are_disjoint_and_drawn_by_lot():
    parts = draw_parts(103, (0.6, 0.2, 0.2), seed=1)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(103))
    assert [len(part) for part in parts] == [62, 20, 21]
    assert not torch.equal(parts[0], draw_parts(103, (0.6, 0.2, 0.2), seed=2)[0])


def test_what_makes_no_sense_is_refused():
    features, label = noise(7, number=12, width=2)
    parts = draw_parts(12)
    broken = features.clone()
    broken[3, 1] = math.nan
    for arguments, options, text in [
        ((features, label[:5], parts), {}, "int64 labels"),
        ((features, label.float(), parts), {}, "int64 labels"),
        ((broken, label, parts), {}, "not finite"),
        ((features, label, (parts[0], parts[0], parts[2])), {}, "no sample twice"),
        ((features, label, (parts[0], parts[1], parts[2][:0])), {}, "no sample twice"),
        ((features, label, parts), {"classes": 2}, "expected 0 to 2 - 1"),
        ((features, label, parts), {"decoder": "tree"}, "decoder among"),
        ((features, label, parts), {"level": 1.0}, "level between"),
    ]:
        with pytest.raises(ValueError, match=text):
            usable_information(*arguments, **options)
    with pytest.raises(ValueError, match="three positive shares"):
        draw_parts(10, (0.5, 0.5))
    with pytest.raises(ValueError, match="too few"):
        draw_parts(2)
    for options in ({"hidden": ()}, {"lr": 0.0}, {"patience": 0}):
        with pytest.raises(ValueError, match="hidden layers and positive numbers"):
            fit_mlp_decoder((features, label), (features, label), torch.zeros(3), **options)
