"""Access maps and receptive fields of one axis: closed forms against the integers."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxstream.errors import RuleError
from fxstream.geometry.box import EMPTY, Interval
from fxstream.geometry.receptive_field import BROADCAST, IDENTITY, AxisExtent, AxisMap, ReceptiveField
from fxstream.report.closed_form import FieldForm

maps = st.builds(
    lambda num, den, first, width: AxisMap(num, den, first, first + width),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(-5, 5),
    st.integers(0, 7),
)


@given(st.lists(maps, min_size=1, max_size=5), st.integers(-40, 40))
@settings(deadline=None, max_examples=300)
def test_composition_is_exact(chain, pixel):
    """`maps` from the source on; the field of the last operator reads what map by map reading reads."""
    field = ReceptiveField.of_map(chain[0])
    for axis_map in chain[1:]:
        field = ReceptiveField.of_map(axis_map).then(field)
    box = Interval(pixel, pixel + 1)
    for axis_map in reversed(chain):
        box = axis_map.read(box)
    assert (field.low(pixel), field.high(pixel) + 1) == (box.start, box.stop)
    assert FieldForm.of(field).at(abs(pixel)) == (field.low(abs(pixel)), field.high(abs(pixel)))
    assert field.stride == math.prod(ReceptiveField.of_map(m).stride for m in chain)


@given(
    st.lists(maps, min_size=2, max_size=4).filter(lambda m: len({ReceptiveField.of_map(x).stride for x in m}) == 1)
)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.filter_too_much])
def test_hull_is_the_hull_of_every_pixel(branches):
    fields = [ReceptiveField.of_map(m) for m in branches]
    hull = fields[0]
    for field in fields[1:]:
        hull = hull.hull(field)
    for pixel in range(-12, 12):
        assert hull.low(pixel) == min(f.low(pixel) for f in fields)
        assert hull.high(pixel) == max(f.high(pixel) for f in fields)


def test_branches_of_different_stride_have_no_field():
    with pytest.raises(RuleError, match="strides 1 and 2"):
        ReceptiveField.of_map(AxisMap(1, 1, 0, 0)).hull(ReceptiveField.of_map(AxisMap(2, 1, 0, 0)))


def test_phases_of_an_upsampling():
    up = ReceptiveField.of_map(AxisMap(1, 2, 0, 0))
    smooth = ReceptiveField.of_map(AxisMap.window(3, 1, 1)).then(up)
    assert (smooth.period, smooth.advance, smooth.lows, smooth.highs) == (2, 1, (-1, 0), (0, 1))
    assert str(FieldForm.of(smooth)) == "floor((o - 1)/2) .. floor((o + 1)/2)"
    assert ReceptiveField.of_map(AxisMap(2, 1, 0, 0)).then(up) == ReceptiveField.of_map(AxisMap(1, 1, 0, 0))
    assert smooth.sizes == (2, 2)


@pytest.mark.parametrize("extent", range(1, 30))
def test_extents_of_windows(extent):
    for kernel, stride, padding, dilation, ceil in [
        (3, 2, 1, 1, True),
        (2, 2, 0, 1, True),
        (3, 3, 1, 1, True),
        (3, 2, 0, 1, False),
        (2, 3, 1, 2, False),
        (5, 1, 2, 1, False),
    ]:
        image = torch.zeros(1, 1, extent)
        try:
            pooled = nn.functional.max_pool1d(image, kernel, stride, padding, dilation, ceil)
        except RuntimeError:
            continue
        assert AxisExtent.window(kernel, stride, padding, dilation, ceil).of(extent) == pooled.shape[-1]


@given(maps, st.integers(-10, 10), st.integers(1, 7))
def test_a_map_reads_what_its_formula_says(axis_map, start, length):
    reads = set()
    for o in range(start, start + length):
        low, high = (
            math.floor((axis_map.num * o + end) / axis_map.den) for end in (axis_map.first, axis_map.last)
        )
        reads |= {low, high}
    assert axis_map.read(Interval(start, start + length)) == Interval(min(reads), max(reads) + 1)
    assert axis_map.read(EMPTY) == EMPTY


@pytest.mark.parametrize("numbers", [(-1, 1, 0, 0), (1, 0, 0, 0), (1, -1, 0, 0), (1, 1, 1, 0)])
def test_maps_that_make_no_sense(numbers):
    with pytest.raises(RuleError, match="an access map"):
        AxisMap(*numbers)


def test_common_maps():
    assert AxisMap.window(5, 2, 1, 3) == AxisMap(2, 1, -1, 11)
    assert AxisMap.shifted(-4).read(Interval(0, 2)) == Interval(-4, -2)
    assert IDENTITY.read(Interval(3, 9)) == Interval(3, 9)
    assert BROADCAST.read(Interval(3, 9)) == Interval(0, 1)


extents_of_one = st.builds(AxisExtent, st.sampled_from([0, 1, 1, 2]), st.integers(1, 4), st.integers(-5, 9))


@given(extents_of_one, extents_of_one, st.integers(0, 60))
def test_one_formula_for_two_extents(consumer, producer, extent):
    both = consumer.after(producer)
    if both is not None:
        assert both.of(extent) == consumer.of(producer.of(extent))
    else:
        assert consumer.num != 1
        assert producer.den != 1


def test_extents_that_add_or_replace():
    assert AxisExtent.changed(-3).of(10) == 7
    assert AxisExtent.fixed(4).of(10) == 4


@given(st.lists(maps, min_size=1, max_size=3), st.integers(1, 4))
@settings(deadline=None, max_examples=150)
def test_what_is_derived_from_a_field_is_what_its_pixels_say(chain, periods):
    """Halo, padding, sizes and the extent of a tile, against the reads of single pixels."""
    field = ReceptiveField.of_map(chain[0])
    for axis_map in chain[1:]:
        field = ReceptiveField.of_map(axis_map).then(field)
    for period in range(1, field.period):
        moved = field.stride * period
        ends = ((end(o), end(o + period)) for end in (field.low, field.high) for o in range(field.period))
        assert any(after - before != moved for before, after in ends)
    sizes = [field.high(o) - field.low(o) + 1 for o in range(field.period)]
    assert field.sizes == (min(sizes), max(sizes))
    assert field.size == max(sizes)
    assert field.padding == -field.low(0)
    assert field.offset * 2 == field.low(0) + field.high(0)
    count = periods * field.period
    scale, constant = field.tile_extent()
    assert scale * count + constant == field.high(count - 1) - field.low(0) + 1
    cells = [(field.stride * o, field.stride * (o + 1)) for o in range(2 * field.period)]
    before = max(math.floor(start) - field.low(o) for o, (start, _) in enumerate(cells))
    after = max(field.high(o) - math.ceil(stop) + 1 for o, (_, stop) in enumerate(cells))
    assert field.halo == (before, after)
    assert field.overlap == before + after
    assert field.read(Interval(2, 2 + count)) == Interval(field.low(2), field.high(1 + count) + 1)
    assert field.read(EMPTY) == EMPTY


def test_a_period_is_that_of_both_ends():
    uneven = ReceptiveField(2, 2, (0, 1), (0, 2))
    assert (uneven.period, uneven.high(1), uneven.high(2)) == (2, 2, 2)
    assert ReceptiveField(2, 2, (0, 1), (0, 1)) == ReceptiveField(1, 1, (0,), (0,))


def test_the_hull_of_fields_of_other_periods():
    one, other = ReceptiveField(2, 2, (0, 1), (0, 2)), ReceptiveField(3, 3, (-1, 1, 2), (0, 1, 3))
    hull = one.hull(other)
    for o in range(-7, 13):
        assert hull.low(o) == min(one.low(o), other.low(o))
        assert hull.high(o) == max(one.high(o), other.high(o))


def test_fields_of_many_phases():
    """Composed in as few phases as they have; a form of too many is refused."""
    up, down = ReceptiveField.of_map(AxisMap(1, 129, 0, 0)), ReceptiveField.of_map(AxisMap(129, 128, 0, 0))
    assert down.then(up).period == 128
    with pytest.raises(RuleError, match="phases is not supported"):
        up.then(ReceptiveField.of_map(AxisMap(1, 128, 0, 0)))
    with pytest.raises(RuleError, match="phases is not supported"):
        ReceptiveField.of_map(AxisMap(1, 2**14 + 1, 0, 0))
