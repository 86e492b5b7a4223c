import numpy as np
import pytest

from lqf_lightning.data.selection import choose_count_per_class, choose_fraction_per_class, choose_lowest, draw_lots

PATHS = [f"class{n % 4}/{n}.png" for n in range(400)]
LABELS = [n % 4 for n in range(400)]


def test_a_smaller_choice_is_a_subset_of_a_larger_one():
    lots = draw_lots(PATHS, 3, "subset")
    chosen = [set(choose_lowest(lots, count)) for count in (10, 40, 200)]
    assert chosen[0] < chosen[1] < chosen[2]


@pytest.mark.parametrize("other", [{"seed": 4, "purpose": "subset"}, {"seed": 3, "purpose": "noise"}])
def test_other_seeds_and_purposes_choose_independently(other):
    lots = draw_lots(PATHS, 3, "subset")
    shared = np.intersect1d(choose_lowest(lots, 200), choose_lowest(draw_lots(PATHS, **other), 200))
    assert abs(len(shared) - 100) < 25  # hypergeometric: mean 100, standard deviation 5


def test_lots_do_not_depend_on_the_other_samples():
    assert draw_lots(PATHS, 0, "x")[7] == draw_lots([PATHS[7]], 0, "x")[0]


def test_a_fraction_holds_in_every_class():
    chosen = choose_fraction_per_class(draw_lots(PATHS, 0, "val"), LABELS, 0.25)
    assert np.bincount(np.array(LABELS)[chosen]).tolist() == [25] * 4


def test_small_classes_keep_a_sample_on_both_sides():
    labels = [0] * 50 + [1] * 2 + [2]
    chosen = choose_fraction_per_class(draw_lots(PATHS[:53], 0, "val"), labels, 0.1)
    assert np.bincount(np.array(labels)[chosen], minlength=3).tolist() == [5, 1, 0]
    chosen = choose_fraction_per_class(draw_lots(PATHS[:53], 0, "val"), labels, 0.99)
    assert np.bincount(np.array(labels)[chosen], minlength=3).tolist() == [49, 1, 0]


def test_shots_name_the_classes_that_are_too_small():
    labels = [0] * 5 + [1] * 3
    with pytest.raises(ValueError, match=r"rare \(3\).*Set data\.shots=3"):
        choose_count_per_class(draw_lots(PATHS[:8], 0, "x"), labels, 4, ["common", "rare"])
    chosen = choose_count_per_class(draw_lots(PATHS[:8], 0, "x"), labels, 3, ["common", "rare"])
    assert np.bincount(np.array(labels)[chosen]).tolist() == [3, 3]
