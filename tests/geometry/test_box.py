"""Intervals and boxes."""

from fxstream.geometry import box


def test_box_arithmetic():
    boxes = box.Box((box.Interval(0, 3), box.Interval(2, 9))), box.Box((box.Interval(2, 5), box.EMPTY))
    assert str(boxes[0].hull(boxes[1])) == "[0:5, 2:9]"
    assert boxes[0].shape == (3, 7)
