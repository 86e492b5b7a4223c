import pytest

from lqf_lightning.forgetting.tug_of_war import tug_of_war

SETS = {"forget": 0.4, "retain": 0.9, "test": 0.7}


def test_equal_accuracies_give_one():
    assert tug_of_war(SETS, SETS) == 1.0


def test_every_set_takes_its_share():
    other = {"forget": 0.5, "retain": 0.7, "test": 0.75}
    assert tug_of_war(other, SETS) == pytest.approx(0.9 * 0.8 * 0.95, rel=1e-12)
    assert tug_of_war(SETS, other) == pytest.approx(0.9 * 0.8 * 0.95, rel=1e-12)


def test_other_sets_and_percentages_are_refused():
    with pytest.raises(ValueError, match="same sets"):
        tug_of_war({"forget": 0.1}, SETS)
    with pytest.raises(ValueError, match="'test'"):
        tug_of_war(SETS | {"test": 70.0}, SETS)
