import pytest
import torch
from torch.distributions import Normal

from lqf_lightning.forgetting.likelihood_ratio_attack import likelihood_ratio_attack
from lqf_lightning.forgetting.shadow_fit import ENOUGH, fit_shadows, logit_confidence


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(models, samples):
    return (torch.arange(models)[:, None] // (1 + torch.arange(samples) % 2)) % 2 == 0


def world(seed, *, models=24, samples=20, others=30, gain=2.0, shift=0.0):
    """Confidences with a difficulty per sample, that training on a sample raises by `gain`.

    The models in question have confidences raised by `shift`, those of other samples alike.
    """
    member = halves(models, samples)
    hard, hard_other = 10 * normal(samples, seed=seed), 10 * normal(others, seed=seed + 1)
    shadow = hard + normal(models, samples, seed=seed + 2) + gain * member
    other_shadow = hard_other + normal(models, others, seed=seed + 3)
    fresh, other = hard + shift + normal(samples, seed=seed + 4), hard_other + shift + normal(others, seed=seed + 5)
    return fresh, fresh + gain, shadow, member, other, other_shadow


def attack(parts, trained):
    fresh, known, shadow, member, other, other_shadow = parts
    return likelihood_ratio_attack(known if trained else fresh, shadow, member, other, other_shadow)


def test_confidence_is_the_log_odds_of_the_right_class():
    logits, label = 3 * normal(2, 5, 4), torch.tensor([0, 3, 1, 2, 2])
    own = torch.softmax(logits, -1).gather(-1, label.reshape(1, -1, 1).expand(2, -1, 1)).squeeze(-1)
    torch.testing.assert_close(logit_confidence(logits, label), (own / (1 - own)).log(), rtol=1e-10, atol=1e-12)


def test_labels_that_are_no_class_are_refused():
    with pytest.raises(ValueError, match="classes 0 to 2"):
        logit_confidence(torch.zeros(2, 3), torch.tensor([0, -1]))


@pytest.mark.parametrize("spread", ["own", "pooled"])
def test_the_score_is_the_log_ratio_of_two_normal_densities(spread):
    member, observed = halves(12, 5), normal(5, seed=7)
    shadow = normal(12, 5, seed=8) * torch.arange(1.0, 6.0) + 2 * member
    inside, outside = ([shadow[chosen[:, i], i] for i in range(5)] for chosen in (member, ~member))
    expected = []
    for i in range(5):
        scales = [
            side[i].std() if spread == "own" else torch.stack([part.var() for part in side]).mean().sqrt()
            for side in (inside, outside)
        ]
        densities = [
            Normal(s[i].mean(), scale).log_prob(observed[i]) for s, scale in zip((inside, outside), scales, strict=True)
        ]
        expected.append(densities[0] - densities[1])
    fit = fit_shadows(shadow, member, spread)
    torch.testing.assert_close(fit.log_ratio(observed), torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_few_models_share_a_deviation_and_many_do_not():
    member = halves(2 * ENOUGH, 4)
    shadow = normal(2 * ENOUGH, 4) * torch.arange(1.0, 5.0)
    assert torch.equal(fit_shadows(shadow, member).deviation_out, fit_shadows(shadow, member, "own").deviation_out)
    few = fit_shadows(shadow[:8], member[:8])
    assert torch.equal(few.deviation_out, few.deviation_out[:1].expand(4))


def test_a_model_that_had_the_cohort_is_told_from_one_that_had_not():
    found = [attack(world(10 * seed), trained) for trained in (True, False) for seed in range(8)]
    for one in found[:8]:
        assert one.auc - 3 * one.error > 0.5
        assert one.in_out_auc - 3 * one.in_out_error > 0.5
    for name in ("auc", "in_out_auc"):
        mean = sum(getattr(one, name) for one in found[8:]) / 8
        error = sum(getattr(one, name.replace("auc", "error")) for one in found[8:]) / 8
        assert mean == pytest.approx(0.5, abs=4 * error / 8**0.5)


def test_in_or_out_compares_with_models_left_out_of_their_own_fit():
    fresh, _, shadow, member, other, other_shadow = world(3, models=8, samples=60, gain=0.0)
    wins = []
    for i in range(60):
        for model in (~member[:, i]).nonzero().flatten().tolist():
            kept = [t for t in range(8) if t != model]
            fit = fit_shadows(shadow[kept], member[kept])
            wins.append(float(fit.log_ratio(fresh)[i] > fit.log_ratio(shadow[model])[i]))
    found = likelihood_ratio_attack(fresh, shadow, member, other, other_shadow)
    assert found.in_out_auc == pytest.approx(sum(wins) / len(wins), rel=1e-12)


def test_more_confidence_on_all_samples_is_no_membership():
    parts = [world(10 * seed, shift=3.0) for seed in range(8)]
    found = [attack(part, False) for part in parts]
    mean = sum(one.auc for one in found) / 8
    assert mean == pytest.approx(0.5, abs=4 * found[0].error / 8**0.5)


def test_the_error_of_a_new_observation_includes_that_of_the_mean():
    # Of the cohort half of the models are "out", of others all: without it, theirs would look more extreme.
    fit = fit_shadows(normal(6, 2), torch.tensor([[True, False]] * 3 + [[False, False]] * 3))
    expected = fit.deviation_out * torch.tensor([1 + 1 / 3, 1 + 1 / 6], dtype=torch.float64).sqrt()
    torch.testing.assert_close(fit.surprise(fit.mean_out + expected), torch.ones(2, dtype=torch.float64))


def test_models_without_spread_give_finite_scores():
    member = halves(8, 3)
    found = likelihood_ratio_attack(
        torch.ones(3), torch.zeros(8, 3) + 1.0 * member, member, torch.zeros(4), torch.zeros(8, 4)
    )
    assert found.auc == 1.0
    assert found.in_out_auc == 1.0


def test_too_few_shadow_models_are_refused():
    fresh, _, shadow, member, other, other_shadow = world(0, models=4)
    with pytest.raises(ValueError, match="shadows=64"):
        likelihood_ratio_attack(fresh, shadow, member, other, other_shadow)
    with pytest.raises(ValueError, match="expected"):
        likelihood_ratio_attack(fresh[:3], shadow, member, other, other_shadow)
