import torch
import torch.distributed as dist

from lqf_lightning.methods.alignment_gap import AlignmentGap
from ranks import run_on_ranks


def problem():
    generator = torch.Generator().manual_seed(0)
    original, noise = (torch.randn(11, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = [torch.randn(11, 3, generator=generator) for _ in range(2)]
    return original + 0.3 * noise, original + 5.0, *logits


def gap_of_share(world):
    gap, share = AlignmentGap(4, head=True), [tensor[dist.get_rank() :: world] for tensor in problem()]
    for start in range(0, len(share[0]), 2):
        gap.update(*(tensor[start : start + 2] for tensor in share))
    return {name: value.item() for name, value in gap.compute().items()}


def test_figures_are_those_of_all_samples_at_once_on_any_number_of_ranks():
    found, original, logits, expected = problem()
    error = (found - original).square().sum() / (original - original.mean(0)).square().sum()
    agreement = (logits.argmax(1) == expected.argmax(1)).double().mean()
    for world in (1, 2, 3):
        for figures in run_on_ranks(world, gap_of_share, world):
            # 11 float64 samples, told in float32
            assert abs(figures["feature_error"] / error.item() - 1) < 1e-6
            assert abs(figures["agreement"] - agreement.item()) < 1e-6


def test_without_a_published_head_there_is_no_agreement():
    gap = AlignmentGap(4, head=False)
    gap.update(*problem())
    assert gap.compute().keys() == {"feature_error"}
