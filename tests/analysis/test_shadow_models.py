import pytest
import torch

from analysis.sharded_data import COHORT, RIDGE, attached, make_data
from lqf_lightning.analysis import problem_of_run
from lqf_lightning.analysis.shadow_models import _halves, shadow_models
from methods.dense_lqf import DenseProblem, jacobian, outputs_at_start
from methods.tensors import build_backbone, draw
from ranks import run_on_ranks

IMAGES, LABEL = draw(24, 1)
VAL = draw(9, 2)[0]


def shadows(count=8, **options):
    return attached(lambda m: shadow_models(problem_of_run(m), COHORT, count, **options))


@pytest.mark.parametrize("ridge", ["mean", "sum"])
def test_every_shadow_model_is_a_refit_on_its_half(ridge):
    found = shadows(ridge=ridge)
    names = [name for group in build_backbone().groups.values() for name in group]
    member = _halves(24, 8, 0)
    assert torch.equal(found.member, member[:, COHORT])
    assert found.exact
    for model in range(8):
        keep = member[model]
        strength = RIDGE * (int(keep.sum()) if ridge == "mean" else 24)
        problem = DenseProblem(IMAGES[keep], LABEL[keep], names, strength)
        dw = problem.optimum()
        for got, images in ((found.cohort, IMAGES[COHORT]), (found.others, VAL)):
            expected = outputs_at_start(images) + jacobian(images, names) @ dw
            torch.testing.assert_close(got[model], expected, rtol=1e-6, atol=1e-6)


def test_every_sample_is_in_half_of_the_models_and_seeds_differ():
    for seed in (0, 1):
        assert (_halves(30, 10, seed).sum(0) == 5).all()
    assert not torch.equal(_halves(30, 10, 0), _halves(30, 10, 1))


def test_the_order_of_the_positions_plays_no_part():
    found = shadows()
    other = attached(lambda m: shadow_models(problem_of_run(m), COHORT.flip(0), 8))
    assert torch.equal(found.cohort, other.cohort)
    assert torch.equal(found.index, COHORT)
    assert torch.equal(found.other_index, torch.arange(9))


@pytest.mark.filterwarnings("ignore:.*sync_dist=True.*")  # the group of the test is not one of the trainer's
def test_shadow_models_are_the_same_on_any_number_of_ranks():
    alone = vars(shadows())
    for found in run_on_ranks(3, lambda: vars(shadows())):
        assert torch.equal(found["member"], alone["member"])
        for name in ("cohort", "others"):
            torch.testing.assert_close(found[name], alone[name], rtol=1e-9, atol=1e-9)


def test_odd_requests_are_refused():
    for count in (4, 7):
        with pytest.raises(ValueError, match="shadows=64"):
            shadows(count)
    with pytest.raises(ValueError, match="rows 0 to 23"):
        attached(lambda m: shadow_models(problem_of_run(m), torch.tensor([24]), 8))
    with pytest.raises(ValueError, match=r"data.val_fraction=0\.1"):
        attached(lambda m: shadow_models(problem_of_run(m), COHORT, 8), data=make_data(val=None))
