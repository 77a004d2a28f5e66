"""Access maps and receptive fields of one axis: closed forms against the integers."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxstream.errors import RuleError
from fxstream.geometry.box import Interval
from fxstream.geometry.receptive_field import AxisExtent, AxisMap, ReceptiveField
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
