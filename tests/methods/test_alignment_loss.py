import torch
from torch.nn import functional as F

from lqf_lightning.methods.alignment_loss import AlignmentLoss, relative_error


def features(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(6, width, generator=generator) for name, width in (("a", 3), ("b", 4), ("c", 5), ("d", 2))
    }


def test_the_loss_is_that_of_features_groups_and_outputs():
    found, expected = features(0), features(1)
    error = {g: ((found[g] - expected[g]) ** 2).sum() / ((expected[g] - expected[g].mean(0)) ** 2).sum() for g in found}
    p, q = (F.softmax(f["d"] / 4, 1) for f in (expected, found))
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    wanted = 2 * error["c"] + 0.5 * (error["a"] + error["b"]) / 2 + 3 * 16 * divergence
    loss = AlignmentLoss(feature_weight=2.0, group_weight=0.5, logit_weight=3.0, temperature=4.0)(found, expected)
    assert torch.isclose(loss, wanted, rtol=1e-5)  # some dozens of additions in float32


def test_the_relative_error_is_one_for_the_mean_and_scales_with_nothing():
    generator = torch.Generator().manual_seed(0)
    found, expected = (torch.randn(7, 3, generator=generator) for _ in range(2))
    assert torch.isclose(relative_error(expected.mean(0).expand(7, 3), expected), torch.tensor(1.0))
    shifted = relative_error(1e2 * found + 5, 1e2 * expected + 5)
    assert torch.isclose(shifted, relative_error(found, expected), rtol=1e-4)
