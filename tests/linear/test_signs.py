import pytest
import torch

from lqf_lightning.linear.signs import sample_signs


def draw(number, seed=0, dtype=torch.float32):
    return torch.randn(number, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_belong_to_the_sample(dtype):
    x = draw(20, dtype=dtype)
    whole, order = sample_signs(x, 5, 0), torch.randperm(20)
    assert torch.equal(sample_signs(x[order], 5, 0), whole[order])
    assert torch.equal(torch.cat([sample_signs(part, 5, 0) for part in x.split([3, 17])]), whole)


def test_signs_are_fair_and_independent():
    signs = sample_signs(draw(4000), 8, 0)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    # Means and correlations of 4000 fair signs deviate from 0 by 1 / sqrt(4000) = 0.016: five deviations.
    assert signs.mean(0).abs().max() < 0.08
    correlation = signs.T @ signs / 4000 - torch.eye(8)
    assert correlation.abs().max() < 0.08
    assert (signs[:-1] * signs[1:]).mean(0).abs().max() < 0.08


def test_another_seed_or_the_least_change_gives_other_signs():
    x = draw(100)
    signs, changed = sample_signs(x, 8, 0), x.clone()
    changed[:, 1, 2] = torch.nextafter(changed[:, 1, 2], torch.tensor(9.0))
    for other in (sample_signs(x, 8, 1), sample_signs(changed, 8, 0), sample_signs(x.flip(1), 8, 0)):
        assert 0.4 < (other == signs).float().mean() < 0.6


def test_samples_of_few_values_differ_too():
    x = torch.zeros(16, 4)
    x[torch.arange(16), torch.arange(16) % 4] = (1 + torch.arange(16) // 4).float()
    assert len({tuple(row) for row in sample_signs(x, 32, 0).tolist()}) == 16
