import pytest

from lqf_lightning.forgetting.anamnesis_index import anamnesis_index


def test_a_model_against_itself_is_one():
    assert anamnesis_index(7, 7) == 1.0
    assert anamnesis_index(0, 0) == 1.0


def test_it_is_the_ratio_of_steps():
    assert anamnesis_index(0, 8) == 0.0
    assert anamnesis_index(12, 8) == 1.5


@pytest.mark.parametrize("steps", [(3, 0), (None, 4), (4, None), (None, None)])
def test_no_number_is_made_up(steps):
    assert anamnesis_index(*steps) is None


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="negative"):
        anamnesis_index(-1, 3)
