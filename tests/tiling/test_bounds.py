"""What tiles read and hold, against a reference that marks every pixel that an operator reads.

Networks of one axis as plain data: each operator has the places of its inputs among the values so far, and a
function that says which pixels of an input one pixel of its result reads.
"""

import dataclasses

import pytest
from small_networks import Function
from torch import nn

import fxstream


@dataclasses.dataclass(frozen=True)
class Window:
    """A convolution."""

    of: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def module(self):
        return nn.Conv1d(1, 1, self.kernel, self.stride, self.padding, self.dilation)

    def extent(self, extent):
        return (extent + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def reads(self, o):
        first = self.stride * o - self.padding  # what lies between the taps is read too: tiles hold intervals
        return range(first, first + self.dilation * (self.kernel - 1) + 1)


@dataclasses.dataclass(frozen=True)
class Repeat:
    """An upsampling by repetition."""

    of: int
    factor: int

    def module(self):
        return nn.Upsample(scale_factor=self.factor)

    def extent(self, extent):
        return extent * self.factor

    def reads(self, o):
        return [o // self.factor]


@dataclasses.dataclass(frozen=True)
class Sum:
    """Two values of one extent, added."""

    of: int
    other: int

    def extent(self, extent):
        return extent

    def reads(self, o):
        return [o]


NETWORKS = {
    "strides and paddings": (Window(0, 3, 2, 1), Window(1, 5, 1, 2), Window(2, 2, 2), Window(3, 3, 1, 1)),
    "dilations": (Window(0, 3, 1, 4, 4), Window(1, 2, 1, 0, 3), Window(2, 3, 2, 3, 3)),
    "down and up": (Window(0, 3, 2, 1), Window(1, 3, 2, 1), Repeat(2, 2), Window(3, 3, 1, 1), Repeat(4, 3)),
    "a branch": (Window(0, 3, 1, 1), Window(1, 9, 1, 4), Window(1, 1), Sum(2, 3), Window(4, 2, 2)),
    "a branch, the wide part last": (
        Window(0, 3, 1, 1),
        Window(1, 1),
        Window(1, 9, 1, 4),
        Sum(2, 3),
        Window(4, 2, 2),
    ),
    "a wide and a strided branch": (
        Window(0, 7, 4, 3),
        Window(0, 1, 4),
        Sum(1, 2),
        Repeat(3, 2),
        Window(4, 3, 1, 1),
    ),
    "reads of padding alone": (Window(0, 1, 1, 2), Window(1, 3, 2, 1), Window(2, 1, 2, 3)),
    "gaps": (Window(0, 1, 3), Window(1, 2, 2), Repeat(2, 5)),
}


def network(operators):
    """The module, which calls its operators in order."""

    def forward(m, x):
        values = [x]
        for i, operator in enumerate(operators):
            if isinstance(operator, Sum):
                values.append(values[operator.of] + values[operator.other])
            else:
                values.append(getattr(m, f"part{i}")(values[operator.of]))
        return values[-1]

    parts = {f"part{i}": op.module() for i, op in enumerate(operators) if not isinstance(op, Sum)}
    return Function(forward, **parts)


def marked(operators, extent, owned):
    """For the image and each operator, the first and last pixel that the pixels `owned` of the last one need.

    A read that lies in padding alone needs the real pixel next to it.
    """
    extents = [extent]
    for operator in operators:
        extents.append(operator.extent(extents[operator.of]))
    needed = [set() for _ in extents]
    needed[-1] = set(owned)
    for place in reversed(range(len(operators))):
        operator = operators[place]
        for of in (operator.of, operator.other) if isinstance(operator, Sum) else (operator.of,):
            ends = {pixel for o in needed[place + 1] for pixel in operator.reads(o)}
            reads = set(range(min(ends), max(ends) + 1)) if ends else set()  # a tile holds what lies between too
            inside = {min(max(pixel, 0), extents[of] - 1) for pixel in reads}
            real = reads & inside
            needed[of] |= real if real else inside
    return [(min(pixels), max(pixels) + 1) if pixels else None for pixels in needed], extents


def planned(name, extent, tile):
    plan = fxstream.plan(network(NETWORKS[name]), (extent,), channels=1, tile=tile, segments=1)
    (segment,) = plan.segments
    (tiles,) = segment.axes
    return segment.segment, tiles


def least_tile(name, extent):
    """The smallest tile that one pixel of the output fits in."""
    with pytest.raises(fxstream.PlanError) as error:
        planned(name, extent, 1)
    return error.value.least_tile


@pytest.mark.parametrize("more", [0, 5, 17])
@pytest.mark.parametrize("extent", [61, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_boxes_hold_what_every_pixel_reads(name, extent, more):
    operators = NETWORKS[name]
    segment, tiles = planned(name, extent, least_tile(name, extent) + more)
    names = [segment.inputs[0], *segment.nodes]
    assert len(names) == len(operators) + 1
    for along in tiles:
        (owned,) = along.outputs
        needed, _ = marked(operators, extent, range(owned.start, owned.stop))
        for node, bounds in zip(names, needed, strict=True):
            box = along.boxes[node]
            assert (box.start, box.stop) == bounds, node


@pytest.mark.parametrize("more", [0, 5, 17])
@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_of_equal_length_partition_the_output_and_read_no_more_than_the_bound(name, more):
    """And are the fewest of these, where nothing is repeated; repetitions favour their multiples, which are not
    looked for.
    """
    operators, extent = NETWORKS[name], 64
    tile = least_tile(name, extent) + more
    _, tiles = planned(name, extent, tile)
    end = marked(operators, extent, [0])[1][-1]

    def grid(count):
        length = -(-end // count)
        return [range(start, min(start + length, end)) for start in range(0, end, length)]

    def fits(parts):
        reads = (marked(operators, extent, part)[0][0] for part in parts)
        return all(stop - start <= tile for start, stop in reads)

    owned = [range(along.outputs[0].start, along.outputs[0].stop) for along in tiles]
    assert owned == grid(len(owned))
    assert fits(owned)
    if not any(isinstance(operator, Repeat) for operator in operators):
        assert not any(fits(grid(count)) for count in range(1, len(owned)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_least_tile_of_an_error_works_and_nothing_less(name):
    least = least_tile(name, 64)
    assert planned(name, 64, least)
    with pytest.raises(fxstream.PlanError, match=f"The smallest tile that works here is {least}"):
        planned(name, 64, least - 1)


def test_outputs_of_several_resolutions_are_cut_at_the_same_fractions():
    parts = {"a": nn.Conv1d(1, 1, 3, 1, 1), "b": nn.Conv1d(1, 1, 2, 2), "c": nn.Conv1d(1, 1, 5)}
    model = Function(lambda m, x: (y := m.a(x), m.b(y), m.c(y)), **parts)
    (segment,) = fxstream.plan(model, (60,), channels=1, tile=20, segments=1).segments
    (tiles,) = segment.axes
    extents = (60, 30, 56)
    assert len(segment.segment.outputs) == 3
    for k, extent in enumerate(extents):
        owned = [p for along in tiles for p in range(along.outputs[k].start, along.outputs[k].stop)]
        assert owned == list(range(extent))
    for along in tiles:
        shares = [along.outputs[k].stop / extent for k, extent in enumerate(extents)]
        assert max(shares) - min(shares) <= 1 / 30


def test_a_tile_of_an_axis_bounds_that_axis_alone():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 5))
    (segment,) = fxstream.plan(model, (40, 50), channels=1, tile=(40, 17), segments=1).segments
    leaf = segment.segment.inputs[0]
    assert [len(tiles) for tiles in segment.axes] == [1, 4]
    assert segment.largest(leaf) == (40, 17)


def test_a_value_further_in_is_bounded_by_the_tile_at_its_resolution():
    """A second segment that starts at half the resolution reads half a tile, rounded up."""
    model = nn.Sequential(nn.Conv1d(1, 1, 2, 2), nn.Conv1d(1, 1, 3, 1, 1), nn.Conv1d(1, 1, 3, 1, 1))
    first, second = fxstream.plan(model, (100,), channels=1, tile=27, segments=("0",)).segments
    assert first.largest(first.segment.inputs[0]) == (26,)
    assert second.largest(second.segment.inputs[0]) == (14,)
