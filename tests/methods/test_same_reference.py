import pytest

from lqf_lightning.methods.same_reference import refuse_other_reference

STORED = {"reference_fingerprint": "aa", "alpha": 1, "beta": 5.0, "top_k": None}
OPTIONS = ("alpha", "beta", "top_k")


def test_every_change_is_told_with_what_was_and_what_is():
    now = {"reference_fingerprint": "bb", "alpha": 1.0, "beta": 4.0, "top_k": 3}
    with pytest.raises(ValueError, match="objective") as error:
        refuse_other_reference(STORED, now, OPTIONS)
    told = str(error.value)
    for change in ("reference_fingerprint was aa and is bb", "beta was 5.0 and is 4.0", "top_k was None and is 3"):
        assert change in told
    assert "alpha" not in told
    assert "Set hydra.run.dir to another folder, or ckpt_path=null to start over" in told


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        (STORED, STORED),
        (STORED, STORED | {"margin": 1.0}),  # not asked for
        ({"alpha": 1.0, "beta": 5.0}, STORED),  # older: knows neither the reference nor an option
        ({"reference_fingerprint": None, "beta": 3.0}, STORED | {"reference_fingerprint": None}),
    ],
)
def test_what_does_not_change_the_objective_is_accepted(stored, now):
    refuse_other_reference(stored, now, OPTIONS)


@pytest.mark.parametrize(("was", "is_now"), [(None, "aa"), ("aa", None)])
def test_a_reference_that_comes_or_goes_is_a_change(was, is_now):
    with pytest.raises(ValueError, match=f"reference_fingerprint was {was} and is {is_now} now"):
        refuse_other_reference(STORED | {"reference_fingerprint": was}, STORED | {"reference_fingerprint": is_now}, ())
