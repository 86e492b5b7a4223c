import torch

from analysis.sharded_data import COHORT, attached, make_data, optimum, retained
from lqf_lightning.analysis.answers_of_model import Questions
from lqf_lightning.analysis.releases import releases
from lqf_lightning.analysis.with_weights import trained_weights
from lqf_lightning.forgetting.release_test import release_test
from methods.dense_lqf import flat, jacobian, outputs_at_start
from methods.tensors import draw

IMAGES = torch.cat([draw(24, 1)[0][COHORT], draw(10, 3)[0]])


def noise(sigma):
    def draw_noise(like, seed):
        generator = torch.Generator().manual_seed(seed)
        return {n: sigma * torch.randn(w.shape, generator=generator, dtype=torch.float64) for n, w in like.items()}

    return draw_noise


def released(weights, sigma, seeds):
    def look(method):
        rows = releases(method, Questions(make_data(), COHORT), weights, noise(sigma), seeds)
        return rows, trained_weights(method)

    return attached(look)


def test_a_release_answers_with_noisy_weights():
    weights = optimum()
    rows, after = released(weights, 0.1, [7, 8])
    for row, seed in zip(rows, (7, 8), strict=True):
        noisy = flat(weights) + flat(noise(0.1)(weights, seed))
        expected = outputs_at_start(IMAGES) + jacobian(IMAGES, list(weights)) @ noisy
        torch.testing.assert_close(row, expected.flatten(), rtol=1e-9, atol=1e-9)
    assert all(not bool(weight.any()) for weight in after.values())


def test_noise_hides_a_small_difference_and_not_a_large_one():
    original, retrained = optimum(), optimum(retained())
    near = {name: retrained[name] + 1e-4 * (original[name] - retrained[name]) for name in retrained}
    reference = released(retrained, 0.02, range(12))[0]
    assert release_test(released(original, 0.02, range(100, 112))[0], reference).p_value == 0.001
    assert release_test(released(near, 0.02, range(100, 112))[0], reference).p_value > 0.05
