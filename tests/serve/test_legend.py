"""The words beside a drawn answer: names and numbers, and nothing that a browser would run."""

import numpy as np

from adaptkit.predict.answers import Classification, Depth, Detection, Panoptic, Segmentation
from adaptkit.serve.legend import MOST, legend, percent

COLOURS = [(1, 2, 3), (4, 5, 6)]


def test_classes_have_a_colour_a_name_a_bar_and_a_share():
    said = legend(Segmentation((1, 4), ["road", "<script>"], COLOURS, mask=np.array([[0, 0, 0, 1]], np.uint8)))
    assert '<i style="background:rgb(1, 2, 3)"></i><span>road</span>' in said
    assert "width:75.0%" in said
    assert "<b>75.0%</b>" in said
    assert "&lt;script&gt;" in said
    assert "<script>" not in said


def test_a_class_of_the_picture_has_its_probability_once_for_each_that_has_the_name():
    said = legend(Classification((1, 4), ["a", "a"], COLOURS, probabilities=np.float32([0.2, 0.8])))
    assert said.index("<b>80.0%</b>") < said.index("<b>20.0%</b>")


def test_objects_have_their_scores_and_many_are_counted():
    def found(n):
        return Detection((9, 9), ["cup", "pen"], COLOURS, boxes=np.zeros((n, 4), np.float32),
                         scores=np.full(n, 0.75, np.float32), labels=np.ones(n, np.int64))  # fmt: skip

    assert legend(found(2)).count("<span>pen</span>") == 2
    assert "<b>0.75</b>" in legend(found(1))
    assert "and 3 more" in legend(found(MOST + 3))
    assert legend(found(MOST + 3)).count("<b>") == MOST
    assert "nothing was found" in legend(found(0))


def test_segments_of_a_class_share_a_row():
    rows = [{"id": 1, "label": 0, "name": "cup", "isthing": True, "area": 1},
            {"id": 2, "label": 0, "name": "cup", "isthing": True, "area": 2},
            {"id": 3, "label": 1, "name": "sky", "isthing": False, "area": 5}]  # fmt: skip
    said = legend(Panoptic((2, 5), ["cup", "sky"], COLOURS, segments=np.zeros((2, 5), np.int32), found=rows))
    assert said.index("<span>sky</span>") < said.index("<span>cup × 2</span>")
    assert "<b>50.0%</b>" in said
    assert "<b>30.0%</b>" in said


def test_a_depth_map_has_the_ends_of_its_colours():
    depth = np.linspace(1, 9, 101, dtype=np.float32)[None]
    said = legend(Depth((1, 101), depth=depth))
    assert "<span>near: 1.08 m</span><span>far: 8.92 m</span>" in said  # its 1st and 99th percentile, as it is drawn
    assert "median 5.00 m" in said
    assert "<span>near: 2.00 m</span>" in legend(Depth((1, 101), depth=depth, between=(2.0, 3.0)))


def test_what_is_there_is_not_nought():
    assert [percent(p) for p in (0.0, 0.0001, 0.0006, 1.0)] == ["0.0%", "<0.1%", "0.1%", "100.0%"]
