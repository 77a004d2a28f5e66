"""Gradients summed over tiles: boxes that overlap, types, and what is asked for."""

import pytest
import torch

from fxstream.runtime.accumulate import Accumulator


def added(sums, *additions):
    for place, box, gradient in additions:
        sums.add(place, box, gradient)
    return sums.gradients()


def test_all_of_a_tile_are_the_same_as_one_by_one():
    additions = [(0, box(0, 5), torch.ones(1, 2, 5)), (1, None, torch.ones(3)), (2, None, torch.ones(2))]
    together, apart = (
        Accumulator([torch.zeros(1, 2, 8)], [torch.zeros(3), torch.zeros(2)], [True] * 3, is_single=False)
        for _ in range(2)
    )
    for _ in range(3):
        left = list(additions)
        together.add_all(left)
        assert left == []
    for found, wanted in zip(together.gradients(), added(apart, *additions * 3), strict=True):
        assert torch.equal(found, wanted)


def box(start, stop):
    return (slice(None), slice(None), slice(start, stop))


def test_boxes_that_overlap_add_up():
    leaf, small = torch.zeros(1, 2, 8), torch.zeros(3)
    sums = Accumulator([leaf], [small], [True, True], is_single=False)
    of_leaf, of_small = added(
        sums,
        (0, box(0, 5), torch.full((1, 2, 5), 1.0)),
        (1, None, torch.full((3,), 2.0)),
        (0, box(3, 8), torch.full((1, 2, 5), 10.0)),
        (1, None, torch.full((3,), 5.0)),
    )
    assert of_leaf[0].tolist() == [[1, 1, 1, 11, 11, 10, 10, 10]] * 2
    assert of_small.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([(0, 3), (3, 6), (6, 8)], [1, 1, 1, 2, 2, 2, 3, 3]),
        ([(6, 8), (0, 3)], [2, 2, 2, 0, 0, 0, 1, 1]),  # one tile has no gradient
        ([(0, 3), (3, 5), (4, 6), (6, 8)], [1, 1, 1, 2, 5, 3, 4, 4]),  # the second ran as halves that overlap
    ],
)
def test_boxes_that_partition_an_input_are_written(monkeypatch, given, wanted):
    """Whatever the memory held before; what nothing was written to is zero."""
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    leaf, tiles = torch.zeros(1, 2, 8), [(0, 3), (3, 6), (6, 8)]
    sums = Accumulator([leaf], [], [True], is_single=False, reads=[(box(*tile),) for tile in tiles])
    gradients = [torch.full((1, 2, b - a), float(k + 1)) for k, (a, b) in enumerate(given)]
    (of_leaf,) = added(sums, *((0, box(*tile), g) for tile, g in zip(given, gradients, strict=True)))
    assert of_leaf[0].tolist() == [wanted] * 2


def test_a_gradient_of_a_tile_is_not_written_to():
    """The first one of a small tensor must not become the sum: autograd may hold it."""
    gradient = torch.ones(3)
    sums = Accumulator([], [torch.zeros(3)], [True], is_single=False)
    added(sums, (0, None, gradient), (0, None, torch.ones(3)))
    assert gradient.tolist() == [1, 1, 1]


def test_narrow_types_are_summed_in_float32_and_returned_as_they_are():
    """256 + 1 is 256 in eight bits: summed in bfloat16 the ones would be lost."""
    sums = Accumulator([], [torch.zeros(1, dtype=torch.bfloat16)], [True], is_single=False)
    ones = [(0, None, torch.ones(1, dtype=torch.bfloat16)) for _ in range(256)]
    (total,) = added(sums, (0, None, torch.full((1,), 256.0, dtype=torch.bfloat16)), *ones)
    assert (total.dtype, total.item()) == (torch.bfloat16, 512)


def test_wide_types_keep_their_bits():
    sums = Accumulator([], [torch.zeros(1, dtype=torch.float64)], [True], is_single=False)
    (total,) = added(sums, (0, None, torch.ones(1).double()), (0, None, torch.full((1,), 2.0**-40).double()))
    assert total.item() == 1 + 2.0**-40


def test_what_was_not_asked_for_and_what_nothing_came_for_is_none():
    sums = Accumulator(
        [torch.zeros(1, 1, 4)], [torch.zeros(2), torch.zeros(2)], [False, True, True], is_single=False
    )
    assert [
        total is None for total in added(sums, (0, box(0, 4), torch.ones(1, 1, 4)), (1, None, torch.ones(2)))
    ] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("extent", [4, 3])
def test_the_only_tile_gives_its_gradient_as_it_is_unless_it_read_a_part(extent):
    leaf, gradient = torch.zeros(1, 1, 4), torch.ones(1, 1, extent)
    (total,) = added(Accumulator([leaf], [], [True], is_single=True), (0, box(0, extent), gradient))
    assert (total is gradient) == (extent == 4)
    assert total.flatten().tolist() == [1.0] * extent + [0.0] * (4 - extent)
