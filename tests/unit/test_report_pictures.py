import numpy as np
import pytest

from mimscale.report.pictures import HIDDEN_COLOUR, class_colour, grey, legend, masked, overlay


def test_background_is_clear_and_a_class_is_tinted():
    levels = np.full((2, 2), 128, np.uint8)
    picture = overlay(levels, np.array([[0, 1], [2, 0]]))
    assert np.array_equal(picture[0, 0], grey(levels)[0, 0])
    assert not np.allclose(picture[0, 1], picture[1, 0])
    assert np.ptp(picture[0, 1]) > 0.1


def test_a_voxel_that_nobody_labelled_is_drawn_white_and_not_as_a_class():
    picture = overlay(np.zeros((1, 1), np.uint8), np.array([[255]], np.uint8))
    assert picture[0, 0].tolist() == [0.5, 0.5, 0.5]


def test_what_was_hidden_has_a_colour_that_no_grey_image_has():
    picture = masked(np.array([[0, 200]], np.uint8), np.array([[True, False]]))
    assert tuple(picture[0, 0]) == HIDDEN_COLOUR
    assert np.ptp(HIDDEN_COLOUR) > 0.1
    assert np.ptp(picture[0, 1]) == 0


def test_the_legend_has_the_colours_of_the_picture():
    items = legend(["grey", "white"])
    assert [item["name"] for item in items] == ["grey", "white"]
    assert [item["colour"] for item in items] == [class_colour(1), class_colour(2)]


@pytest.mark.parametrize("classes", [2, 8, 15, 105])
def test_every_class_has_a_colour_however_many_there_are(classes):
    assert len(legend([str(number) for number in range(1, classes)])) == classes - 1
