"""What is read ahead and held between tiles: each pixel once, the right pixels, no more than is allowed."""

import numpy as np
import pytest
import torch
from counted import Counted
from hypothesis import given
from hypothesis import strategies as st

import fxstream
from fxstream.geometry.box import Box, Interval
from fxstream.runtime import prefetch
from fxstream.runtime.prefetch import shared_boxes, without


def image(*shape):
    return np.random.default_rng(0).integers(0, 9, shape, dtype=np.uint8)


def overlapping(size, halo=2):
    """Boxes of a grid over 30 x 21 pixels that reach over their neighbours."""
    rows = [Interval(max(0, start - halo), min(30, start + size)) for start in range(0, 30, 4)]
    columns = [Interval(start, min(21, start + size)) for start in range(0, 21, 3)]
    return [Box((row, column)) for row in rows for column in columns]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [3, 5, 8])
def test_each_pixel_once_whatever_the_overlap(size, reverse):
    """Boxes of an irregular grid, overlapping by more than a tile: still one read per pixel."""
    array, boxes = Counted(image(1, 1, 30, 21)), overlapping(size)
    calls = [box.index((2, 3), 4) for box in (reversed(boxes) if reverse else boxes)]
    overlaps = prefetch._Overlaps(fxstream.source(array), calls)
    for call in calls:
        assert torch.equal(overlaps.read(call), torch.from_numpy(array.array[call]))
    assert array.counts.max() == 1
    assert overlaps._bytes == 0


@pytest.mark.parametrize("most", [0, 7, 40, 100])
def test_no_more_is_held_than_is_allowed(most, monkeypatch):
    monkeypatch.setattr(prefetch, "MOST_HELD", most)
    array = Counted(image(1, 2, 30, 21))
    calls = [box.index((2, 3), 4) for box in overlapping(5)]
    overlaps = prefetch._Overlaps(fxstream.source(array), calls)
    for call in calls:
        assert torch.equal(overlaps.read(call), torch.from_numpy(array.array[call]))
        pieces = [piece.pixels for several in overlaps._pieces.values() for piece in several]
        assert sum(piece.untyped_storage().nbytes() for piece in pieces) <= most  # and none holds more than it is
    assert array.counts.max() > 1


spans = st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda pair: pair[0] < pair[1])
boxes = st.tuples(spans, spans).map(lambda pair: Box(tuple(Interval(*span) for span in pair)))


def pixels(box):
    rows, columns = box
    return {(i, j) for i in range(rows.start, rows.stop) for j in range(columns.start, columns.stop)}


@given(boxes, boxes)
def test_a_box_less_a_slab_is_what_the_slab_leaves_where_that_is_a_box(box, slab):
    rest = without(box, slab)
    left = pixels(box) - pixels(slab)
    assert left <= pixels(rest) <= pixels(box)
    rows, columns = {i for i, _ in left}, {j for _, j in left}
    if left == {(i, j) for i in rows for j in columns} and all(
        found == set(range(min(found), max(found) + 1)) for found in (rows, columns) if found
    ):
        assert pixels(rest) == left


@given(st.lists(boxes, min_size=2, max_size=6))
def test_what_two_boxes_share_is_in_both(several):
    order = {box: place for place, box in reversed(list(enumerate(several)))}
    for box, shares in shared_boxes(several).items():
        for slab, following in shares:
            assert pixels(slab) == pixels(box) & pixels(following)
            assert sum(a != b for a, b in zip(box, following, strict=True)) == 1
            assert following in order


def test_boxes_that_differ_along_two_axes_share_nothing():
    assert shared_boxes([Box((Interval(0, 4), Interval(0, 4))), Box((Interval(2, 6), Interval(2, 6)))]) == {}
