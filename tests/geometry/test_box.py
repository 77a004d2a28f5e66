"""Intervals and boxes, held against sets of pixels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxstream.geometry.box import EMPTY, Box, Interval

bounds = st.tuples(st.integers(-9, 14), st.integers(-9, 14))
intervals = bounds.map(lambda pair: Interval(*pair))
extents = st.integers(1, 10)


def pixels(interval):
    return set(range(interval.start, interval.stop))


def test_all_empty_intervals_are_one():
    assert {Interval(5, 2), Interval(3, 3), Interval(-2, -2), EMPTY} == {EMPTY}
    assert len(Interval(5, 2)) == 0
    assert Interval(0, 3) != Interval(0, 4)


@given(intervals, intervals)
def test_hull_is_the_smallest_that_holds_both(one, other):
    both = pixels(one) | pixels(other)
    hull = one.hull(other)
    assert pixels(hull) == (set(range(min(both), max(both) + 1)) if both else set())
    assert hull == other.hull(one)


@given(intervals, extents)
def test_what_lies_inside_and_outside(interval, extent):
    inside = pixels(interval) & set(range(extent))
    assert pixels(interval.clip(extent)) == inside
    before, after = interval.outside(extent)
    if len(interval):
        assert before == len([p for p in pixels(interval) if p < 0])
        assert after == len([p for p in pixels(interval) if p >= extent])
    if len(interval) and inside:
        assert interval.nearest(extent) == interval.clip(extent)


@pytest.mark.parametrize(
    ("interval", "extent", "nearest"),
    [((-3, -1), 10, (0, 1)), ((-2, 0), 10, (0, 1)), ((10, 12), 10, (9, 10)), ((12, 13), 10, (9, 10))],
)
def test_the_nearest_pixel_stands_for_a_read_of_padding(interval, extent, nearest):
    assert Interval(*interval).nearest(extent) == Interval(*nearest)


@given(intervals, st.integers(1, 6))
def test_parts_of_a_split_are_the_whole_in_order(interval, length):
    parts = interval.split(length)
    assert [p for part in parts for p in range(part.start, part.stop)] == sorted(pixels(interval))
    assert all(len(part) == length for part in parts[:-1])
    assert all(0 < len(part) <= length for part in parts[-1:])


def test_box_arithmetic():
    one, other = Box((Interval(0, 3), Interval(2, 9))), Box((Interval(2, 5), EMPTY))
    assert str(one.hull(other)) == "[0:5, 2:9]"
    assert one.shape == (3, 7)
    assert list(one) == [Interval(0, 3), Interval(2, 9)]


@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from([(1, 2), (2, 3), (1, 3)]))
def test_the_subscript_of_a_box_cuts_it_and_is_read_back(first, second, dims):
    box = Box((Interval(first, 5), Interval(second, 6)))
    image = torch.arange(5 * 5 * 6 * 6).view(5, 5, 6, 6)
    subscript = box.index(dims, 4)
    assert all((subscript[d] == slice(None)) == (d not in dims) for d in range(4))
    cut = image[subscript]
    assert [cut.shape[d] for d in dims] == list(box.shape)
    assert cut.flatten()[0] == image[tuple(s.start or 0 for s in subscript)]
    whole = Box.of(subscript, image.shape)
    assert [whole.intervals[d] for d in dims] == list(box)
    assert all(whole.intervals[d] == Interval(0, image.shape[d]) for d in range(4) if d not in dims)


def test_missing_and_negative_slices():
    box = Box.of((slice(None, 2), slice(-3, -1)), (4, 5, 6))
    assert box == Box((Interval(0, 2), Interval(2, 4), Interval(0, 6)))
    assert Box.of((), (2, 3)).shape == (2, 3)
