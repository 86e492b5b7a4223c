import pytest
import torch

from lqf_lightning.teachers import SharedClasses


def test_columns_of_both_models_mean_the_same_classes():
    new, old = ["ant", "bee", "cat", "dog"], ["dog", "elk", "bee"]
    shared = SharedClasses(new, old)
    assert (
        [new[i] for i in shared.new_columns] == [old[i] for i in shared.old_columns] == shared.names == ["bee", "dog"]
    )
    assert not shared.same
    assert SharedClasses(new, new).same
    assert not SharedClasses(new, new[::-1]).same


def test_the_old_model_is_right_among_all_its_classes_and_never_on_unknown_ones():
    shared = SharedClasses(["ant", "bee", "dog"], ["dog", "elk", "bee"])
    outputs = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.5], [2.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    target = torch.tensor([1, 1, 2, 0])  # bee, bee (taken for an elk), dog, ant (unknown)
    assert shared.old_right(outputs, target).tolist() == [True, False, True, False]
    assert shared.old_position(target).tolist() == [2, 2, 0, -1]


def test_models_without_a_common_class_are_refused():
    with pytest.raises(
        ValueError, match=r"classes \[ant\] and the old model's \[1, 2, 3, 4, 5, \.\.\.\] share no name"
    ):
        SharedClasses(["ant"], ["1", "2", "3", "4", "5", "6"])


def test_classes_that_the_old_model_lacks_are_told_and_those_that_it_has_besides_are_not():
    renamed = SharedClasses(["blue", "red", "verde"], ["blue", "green", "red"]).difference()
    assert "does not know [verde]; it knows [green], which the data lack" in renamed
    fewer = SharedClasses(["blue", "red"], ["red"]).difference()
    assert "does not know [blue]: " in fewer
    assert SharedClasses(["red"], ["blue", "green", "red"]).difference() == ""
    assert SharedClasses(["red", "blue"], ["blue", "red"]).difference() == ""
