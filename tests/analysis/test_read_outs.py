import json
import math
from dataclasses import replace

import pytest
import torch

from analysis.sharded_data import COHORT, attached, make_data, optimum, retained
from lqf_lightning.analysis import problem_of_run
from lqf_lightning.analysis.answers_of_model import Questions
from lqf_lightning.analysis.read_outs import read_outs
from lqf_lightning.analysis.relearn import Relearning, RelearnOptions
from lqf_lightning.analysis.shadow_models import shadow_models
from lqf_lightning.analysis.with_weights import with_weights
from lqf_lightning.forgetting.activation_distance import activation_distance
from lqf_lightning.methods.losses import scaled_squared_loss
from methods.dense_lqf import ALPHA


def loss(logits, label):
    return scaled_squared_loss(logits, label, ALPHA)


@pytest.fixture(scope="module")
def found():
    """Answers, steps and shadow models of a model with the cohort, of one without it, and of a fair twin of this."""
    keep = retained()
    weights = {"original": optimum(), "scrubbed": optimum(keep), "retrained": optimum(keep)}

    def look(method):
        questions = Questions(make_data(), COHORT, validation=True)
        answers = {}
        for name, own in weights.items():
            with with_weights(method, own):
                answers[name] = questions.ask(method)
        with with_weights(method, weights["original"]):
            options = RelearnOptions(samples=24, batch_size=24, tolerance=0.5)
            relearning = Relearning(method, make_data(), COHORT, keep, options)
        steps = {name: relearning.steps(own) for name, own in weights.items()}
        return answers, steps, relearning.describe(), shadow_models(problem_of_run(method), COHORT, 32)

    return attached(look)


@pytest.fixture(scope="module")
def report(found):
    answers, steps, description, shadows = found
    return read_outs(answers, loss, relearn_steps=steps, relearn=description, shadows=shadows)


def test_the_retrained_model_compared_with_itself_is_perfect(report):
    for name in ("retrained", "scrubbed"):
        entry = report["models"][name]
        assert entry["activation_distance"] == pytest.approx({"retain": 0, "forget": 0, "test": 0}, abs=1e-9)
        assert entry["tug_of_war"] == 1.0
        assert entry["anamnesis_index"] == 1.0
    assert report["models"]["retrained"]["activation_distance"] == {"retain": 0.0, "forget": 0.0, "test": 0.0}


def test_a_model_that_learned_the_cohort_by_heart_is_seen_by_every_read_out(report):
    original, retrained = report["models"]["original"], report["models"]["retrained"]
    assert original["forget_error"] < retrained["forget_error"]
    assert original["forget_loss"] < 0.5 * retrained["forget_loss"]
    assert original["activation_distance"]["forget"] > 0.2
    assert original["tug_of_war"] < 0.9
    assert original["relearn_steps"] == 0
    assert original["anamnesis_index"] == 0.0
    assert retrained["relearn_steps"] > 0
    assert original["likelihood_ratio_auc"] - 3 * original["likelihood_ratio_error"] > 0.5
    assert original["likelihood_ratio_in_out_auc"] - 3 * original["likelihood_ratio_in_out_error"] > 0.5


def test_no_attack_tells_a_retrained_model_from_one_without_the_cohort(report):
    retrained, scrubbed = report["models"]["retrained"], report["models"]["scrubbed"]
    assert retrained["likelihood_ratio_auc"] == pytest.approx(0.5, abs=3 * retrained["likelihood_ratio_error"])
    for name in ("entropy_attack", "likelihood_ratio_auc", "likelihood_ratio_in_out_auc"):
        assert scrubbed[name] == retrained[name]


def test_errors_losses_and_distances_are_those_of_the_answers(found, report):
    answers, entry = found[0], report["models"]["original"]
    for part in ("retain", "forget", "test"):
        own, other = getattr(answers["original"], part), getattr(answers["retrained"], part)
        wrong = float((own.logits.argmax(1) != own.label).double().mean())
        assert entry[f"{part}_error"] == pytest.approx(wrong, abs=1e-12)
        expected = activation_distance(own.logits, other.logits)
        assert entry["activation_distance"][part] == expected
        squares = (own.logits - ALPHA * torch.eye(3, dtype=torch.float64)[own.label]).square().sum(1)
        assert entry[f"{part}_loss"] == pytest.approx(float(squares.mean() / 2), rel=1e-12)


def test_the_report_is_plain_and_names_its_norm(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["norm"] == "L1 of softmax outputs"
    assert report["against"] == "retrained"
    assert report["likelihood_ratio"] == {"shadows": 32, "exact": True, "why": None}
    assert set(report["models"]) == {"original", "scrubbed", "retrained"}


def test_what_was_not_measured_is_none_and_says_why(found):
    answers = {name: found[0][name] for name in ("original", "scrubbed")}
    report = read_outs(answers, loss, shadows="the run has no kernel")
    assert report["against"] is None
    assert report["relearn"] is None
    assert report["likelihood_ratio"]["why"] == "the run has no kernel"
    for entry in report["models"].values():
        for name in (
            "activation_distance", "tug_of_war", "relearn_steps", "anamnesis_index", "likelihood_ratio_auc",
        ):  # fmt: skip
            assert entry[name] is None


def test_the_norm_and_the_temperature_are_passed_on(found):
    answers = found[0]
    report = read_outs(answers, loss, norm="l2", temperature=ALPHA)
    expected = activation_distance(
        answers["original"].forget.logits, answers["retrained"].forget.logits, norm="l2", temperature=ALPHA
    )
    assert report["models"]["original"]["activation_distance"]["forget"] == expected
    assert report["norm"] == "L2 of softmax outputs"
    assert report["temperature"] == ALPHA


def test_models_asked_about_other_samples_are_refused(found):
    answers = dict(found[0])
    part = answers["scrubbed"].forget
    answers["scrubbed"] = replace(answers["scrubbed"], forget=replace(part, index=part.index + 1))
    with pytest.raises(ValueError, match="different forget samples"):
        read_outs(answers, loss)


def test_shadow_models_of_another_cohort_are_refused(found):
    answers, _, _, shadows = found
    with pytest.raises(ValueError, match="another cohort"):
        read_outs(answers, loss, shadows=replace(shadows, index=shadows.index + 1))
    with pytest.raises(ValueError, match="validation=True"):
        read_outs({"original": replace(answers["original"], validation=None)}, loss, shadows=shadows)


def test_a_number_that_is_none_is_refused(found):
    with pytest.raises(ValueError, match=r"read_outs\.models\.original\.retain_loss is nan"):
        read_outs(found[0], lambda logits, label: torch.tensor(math.nan))
