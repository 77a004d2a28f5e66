"""Tiles by arithmetic, against a walk for each of them."""

import time

import pytest
import torch.nn.functional as F
from small_networks import Function, conv
from torch import nn

import fxstream
from fxstream.tiling.axes.grid import Grid
from fxstream.tiling.request import Request


def resized(m, x):
    return m.b(F.interpolate(m.a(x), scale_factor=1.7, mode="bilinear"))


def mirrored(m, x):
    return m.b(F.pad(m.a(x), (3, 3, 3, 3), mode="reflect"))


def several(m, x):
    y = m.a(x)
    return y, m.b(y), m.b(m.a(y)).relu()


MODELS = {
    "windows": nn.Sequential(conv(1, 2, stride=2, padding=1), nn.ReLU(), conv(2, 1, padding=1, dilation=2)),
    "pools": nn.Sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(1, 1), nn.AvgPool2d(3, 3, 1)),
    "up and down": nn.Sequential(nn.Upsample(scale_factor=3), conv(1, 1, 5, stride=2, padding=2)),
    "transposed": nn.Sequential(nn.ConvTranspose2d(1, 1, 4, 3, 1), conv(1, 1, stride=2)),
    "resized": Function(resized, a=conv(1, 1, padding=1), b=conv(1, 1)),
    "mirrored": Function(mirrored, a=conv(1, 1), b=conv(1, 1, stride=2)),
    "several outputs": Function(several, a=conv(1, 1, padding=1), b=conv(1, 1, stride=2, padding=1)),
}


@pytest.mark.parametrize("length", [1, 3, 7, 16])
@pytest.mark.parametrize("extent", [61, 96])
@pytest.mark.parametrize("name", MODELS)
def test_tiles_and_what_they_hold_are_those_of_a_walk_for_each(name, extent, length):
    if name == "several outputs" and length == 1:
        pytest.skip("tiles that own nothing of some output do not repeat, and are sampled")
    plan = fxstream.plan(MODELS[name], (extent, extent), channels=1, tile=60, segments=1)
    for part in plan.segments:
        grid = Grid(part.segment, Request(None), 1)
        tiles = grid.tiles_of(length)
        walked = [grid._walk.tile(grid.owned(length, i)) for i in range(len(tiles))]
        assert list(tiles) == walked
        assert [tile.program_key for tile in tiles] == [tile.program_key for tile in walked]
        assert tiles[-1] == walked[-1]
        for node in part.segment.nodes:
            lengths = [len(tile.boxes.get(node, ())) for tile in walked]
            assert tiles.largest(node) == max(lengths)
            assert tiles.total(node) == sum(lengths)
        if len(tiles) > 12 and name != "resized":
            assert len(tiles.classes) < len(tiles)


def test_a_million_pixels_take_no_longer_than_a_thousand():
    (part,) = fxstream.plan(MODELS["windows"], (1000, 10**6), channels=1, tile=(60, 60), segments=1).segments
    grids = [Grid(part.segment, Request(None), axis) for axis in (0, 1)]
    assert [len(grid.tiles_of(8).classes) for grid in grids] == [3, 3]
    start = time.process_time()
    tiles = grids[1].tiles_of(8)
    assert len(tiles) == 62500
    assert tiles.total(part.segment.nodes[0]) > tiles.total(part.segment.nodes[-1])
    assert tiles[40000].outputs == grids[1].owned(8, 40000)
    assert time.process_time() - start < 0.05
