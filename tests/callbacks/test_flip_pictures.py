import math

import numpy as np
import pandas as pd
import pytest
from lqf_lightning.callbacks.flip_pictures import draw_flip_matrix, draw_flips
from PIL import Image

from lqf_lightning.data import NoAugmentation
from lqf_lightning.data.thumbnails import load_thumbnails
from old_models import noise_data, write_noise


def flips(*pairs):
    """What was right, and what is said instead."""
    table = pd.DataFrame(pairs, columns=["class", "new_prediction"])
    table["old_prediction"] = table["class"]
    return table.assign(old_confidence=0.75, new_confidence=np.linspace(1, 0.5, len(table)))


def shown(figure):
    """Class names of rows and columns, and the number in each marked cell."""
    axes = figure.axes[0]
    rows, columns = ([label.get_text() for label in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis))
    cells = {(rows[int(t.get_position()[1])], columns[int(t.get_position()[0])]): t.get_text() for t in axes.texts}
    return rows, columns, cells


def test_the_matrix_counts_which_class_takes_the_place_of_which():
    figure = draw_flip_matrix(flips(("cat", "dog"), ("ant", "cat"), ("cat", "dog"), ("dog", "cat")), "title $1")
    rows, columns, cells = shown(figure)
    assert rows == columns == ["ant", "cat", "dog"]  # no others
    assert cells == {("cat", "dog"): "2", ("ant", "cat"): "1", ("dog", "cat"): "1"}
    assert figure.get_suptitle() == "title $1"
    figure.canvas.draw()


def test_of_many_classes_the_matrix_shows_those_with_most_flips():
    pairs = [(f"class {i:02d}", f"class {i + 1:02d}") for i in range(0, 80, 2) for _ in range(i + 1)]
    figure = draw_flip_matrix(flips(*pairs), "title")
    rows, _, cells = shown(figure)
    assert rows == [f"class {i}" for i in range(50, 80)]
    assert len(cells) == 15
    assert figure.get_suptitle() == f"title\n30 of 80 classes, {sum(range(51, 80, 2))} flips"


def test_long_names_keep_both_ends():
    rows, _, _ = shown(draw_flip_matrix(flips(("a class with a long name: 1", "a class with a long name: 2")), "title"))
    assert rows == ["a class w..g name: 1", "a class w..g name: 2"]


@pytest.mark.parametrize("number", [1, 8, 11])
def test_every_flip_is_shown_with_what_both_models_say(number):
    table = flips(*[(f"old$ {i}", f"new$ {i}") for i in range(number)])
    table.loc[0, "old_confidence"] = math.nan
    figure = draw_flips(table, [Image.new("RGB", (7, 7), (i, 0, 0)) for i in range(number)], "title")
    panels = [axes for axes in figure.axes if axes.images]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in panels] == list(range(number))
    said = [(axes.get_title(), axes.get_xlabel()) for axes in panels]
    assert said[0] == ("old$ 0", "new$ 0 1.00")
    assert said[1:] == [(f"old$ {i} 0.75", f"new$ {i} {table['new_confidence'][i]:.2f}") for i in range(1, number)]
    figure.canvas.draw()


def test_no_flips_are_said_to_be_none():
    for figure in (draw_flips(flips(), [], "title"), draw_flip_matrix(flips(), "title")):
        assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["none"]
        figure.canvas.draw()


@pytest.mark.parametrize(("size", "side"), [(6, 6), (224, 96)])
def test_thumbnails_are_what_the_network_sees_but_small(size, side, tmp_path):
    root = write_noise(tmp_path / "images")
    data = noise_data(root, image_size=size, crop_fraction=0.75)
    rows = data.manifest.rows("test")
    index = rows["index"].tolist()[5:1:-2]
    for image, row in zip(load_thumbnails(data, "test", index), index, strict=True):
        expected = NoAugmentation(side, 0.75)(Image.open(root / rows["path"][row]))
        assert image.size == (side, side)
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
