import pytest
import torch

from lqf_lightning.congruence.mixing import mixed_objective

CE, FD = torch.tensor(2.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)


def test_the_paper_adds_and_the_released_recipes_share():
    assert mixed_objective(CE, FD).item() == 7.0
    assert mixed_objective(CE, FD, strength=0.2, distillation_share=0.1).item() == 3.0
    assert mixed_objective(CE, FD, "released", strength=9.0).item() == pytest.approx(0.9 * 5 + 0.1 * 2)
    assert mixed_objective(CE, FD, "released", distillation_share=0.8).item() == pytest.approx(0.8 * 5 + 0.2 * 2)


def test_a_share_is_the_paper_with_a_strength_and_another_learning_rate():
    share = 0.8
    shared = mixed_objective(CE, FD, "released", distillation_share=share)
    added = mixed_objective(CE, FD, "paper", strength=share / (1 - share))
    assert shared.item() == pytest.approx((1 - share) * added.item(), rel=1e-14)


def test_gradients_have_the_weights_of_the_terms():
    terms = [CE.clone().requires_grad_(), FD.clone().requires_grad_()]
    mixed_objective(*terms, "released", distillation_share=0.75).backward()
    assert [term.grad.item() for term in terms] == [0.25, 0.75]


@pytest.mark.parametrize("shapes", [((4,), ()), ((), (4,)), ((4,), (4,))])
def test_terms_that_are_not_means_are_refused(shapes):
    with pytest.raises(ValueError, match="means over the batch, scalars, got shapes"):
        mixed_objective(*map(torch.zeros, shapes))


def test_an_unknown_mixing_names_the_override():
    with pytest.raises(ValueError, match=r"'half'.*method\.mixing=paper"):
        mixed_objective(CE, FD, "half")
