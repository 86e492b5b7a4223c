import pytest
import torch

from analysis.sharded_data import COHORT, attached, make_data, optimum, retained
from lqf_lightning.analysis.answers_of_model import Questions, collect_answers
from lqf_lightning.analysis.with_weights import with_weights
from lqf_lightning.methods import Finetune
from methods.dense_lqf import flat, jacobian, outputs_at_start, scatter_deltas
from methods.tensors import CLASSES, SGD, build_backbone, draw
from ranks import run_on_ranks

TRAIN, TEST = draw(24, 1), draw(10, 3)


def ask(method=None, data=None, **options):
    data = data or make_data()
    return attached(lambda m: collect_answers(m, data, COHORT, **options), method, data)


def test_answers_of_lqf_are_its_linear_outputs():
    weights = optimum()

    def look(method):
        with with_weights(method, weights):
            return collect_answers(method, make_data(), COHORT)

    found = attached(look)
    names = list(weights)
    for part, images, label in (
        (found.forget, TRAIN[0][COHORT], TRAIN[1][COHORT]),
        (found.retain, TRAIN[0][retained()], TRAIN[1][retained()]),
        (found.test, *TEST),
    ):
        expected = outputs_at_start(images) + jacobian(images, names) @ flat(weights)
        torch.testing.assert_close(part.logits, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(part.label, label)
        assert part.accuracy == float((expected.argmax(1) == label).double().mean())
    assert torch.equal(found.forget.index, COHORT)
    assert torch.equal(found.retain.index, retained())


def test_answers_of_fine_tuning_are_those_of_evaluation_and_training_goes_on_as_before():
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)  # batch norm and dropout in training mode
    modes = []

    def look(method):
        found = collect_answers(method, make_data(), COHORT)
        modes.extend(module.training for module in method.modules())
        return found

    found = attached(look, method)
    expected = build_backbone().model(TRAIN[0][COHORT])
    torch.testing.assert_close(found.forget.logits, expected, rtol=1e-12, atol=1e-12)
    assert all(modes)


def test_the_order_of_the_cohort_plays_no_part():
    found, other = (attached(lambda m, c=c: collect_answers(m, make_data(), c)) for c in (COHORT, COHORT.flip(0)))
    assert torch.equal(found.forget.logits, other.forget.logits)
    assert torch.equal(found.forget.index, other.forget.index)


def test_validation_samples_are_asked_when_wanted():
    assert ask().validation is None
    found = ask(validation=True)
    torch.testing.assert_close(found.validation.logits, outputs_at_start(draw(9, 2)[0]), rtol=1e-12, atol=1e-12)


def test_questions_stay_the_same_when_the_data_forgets():
    def look(method):
        data = make_data()
        questions = Questions(data, COHORT)
        before = questions.ask(method)
        data.splits["train"] = tuple(part[retained()] for part in data.splits["train"])
        return before, questions.ask(method)

    before, after = attached(look)
    for part in ("forget", "retain", "test"):
        assert torch.equal(getattr(before, part).logits, getattr(after, part).logits)


@pytest.mark.filterwarnings("ignore:.*sync_dist=True.*")  # the group of the test is not one of the trainer's
def test_answers_are_the_same_on_any_number_of_ranks():
    def rank():
        found = ask(validation=True)
        return {name: vars(getattr(found, name)) for name in ("forget", "retain", "test", "validation")}

    alone = rank()
    for world in (2, 3):
        for found in run_on_ranks(world, rank):
            for part, columns in alone.items():
                assert torch.equal(found[part]["index"], columns["index"])
                assert torch.equal(found[part]["label"], columns["label"])
                torch.testing.assert_close(found[part]["logits"], columns["logits"], rtol=1e-12, atol=1e-12)


def test_without_samples_to_compare_with_it_is_refused():
    with pytest.raises(ValueError, match=r"no test sample .*data.val_fraction=0\.1"):
        Questions(make_data(test=None), COHORT)
    with pytest.raises(ValueError, match="no retain sample"):
        attached(lambda m: collect_answers(m, make_data(), torch.arange(24)))


def test_a_cohort_that_is_gone_is_refused():
    data = make_data()
    data.chosen_dataloader = lambda indices: data._share("train", indices[1:])
    with pytest.raises(ValueError, match=r"6 samples .* 5 came"):
        ask(data=data)


def test_a_model_that_has_diverged_is_refused():
    def look(method):
        scatter_deltas(method)
        with torch.no_grad():
            method.linearized.deltas["fc.bias"].fill_(torch.inf)
        return collect_answers(method, make_data(), COHORT)

    with pytest.raises(ValueError, match="diverged"):
        attached(look)
