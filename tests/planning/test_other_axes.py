"""Regions whose tiled axes are fewer than the image's, others, or more."""

import pytest
import torch
from compare import assert_streams
from small_networks import Function
from torch import nn

import fxstream
from fxstream.graph.typed_graph import TypedGraph
from fxstream.rules import Value
from fxstream.tiling.request import Request, tile_bounds

NETWORKS = {
    "volume to image": (
        nn.Sequential(nn.Conv3d(1, 2, (5, 3, 3)), nn.ReLU(), nn.Flatten(1, 2), nn.Conv2d(16, 4, 3), nn.ReLU()),
        (1, 1, 12, 22, 20),
        [16, (12, 16, 14)],  # tiled along height and width alone
    ),
    "image to signal": (
        nn.Sequential(nn.Conv2d(1, 2, (3, 5)), nn.ReLU(), nn.Flatten(1, 2), nn.Conv1d(16, 4, 5), nn.ReLU()),
        (2, 1, 10, 60),
        [18, (10, 18)],
    ),
    "signal to image": (
        nn.Sequential(nn.Conv1d(1, 12, 5), nn.ReLU(), nn.Unflatten(1, (2, 6)), nn.Conv2d(2, 4, 3), nn.ReLU()),
        (1, 1, 60),
        [18, (18,)],
    ),
}


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_regions_after_a_change_of_axes(name):
    model, shape, tiles = NETWORKS[name]
    image = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    for tile in tiles:
        assert_streams(model.double(), image, tile=tile, segments=1)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_frames_as_a_batch_are_tiled_along_height_and_width():
    parts = {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(4, 2, 3, padding=1)}
    model = Function(
        lambda m, x: m.b(torch.relu(m.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2]),
        **parts,
    ).double()
    clip = torch.randn(2, 3, 3, 40, 36, dtype=torch.float64, requires_grad=True)
    plan = assert_streams(model, clip, tile=20)
    assert plan.streamed_share == 1
    assert fxstream.compile(model, tile=(20, 16))(clip).shape == (2, 3, 2, 40, 36)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_rows_as_a_batch_are_tiled_along_the_row():
    def rows(m, x):
        n, c, h, w = x.shape
        y = m.b(torch.relu(m.a(x.permute(0, 2, 1, 3).reshape(n * h, c, w))))
        return y.reshape(n, h, -1, y.shape[-1])

    model = Function(rows, a=nn.Conv1d(3, 4, 5), b=nn.Conv1d(4, 2, 3)).double()
    assert_streams(model, torch.randn(2, 3, 6, 50, dtype=torch.float64, requires_grad=True), tile=20)


def test_bands_that_become_channels_are_whole():
    model = nn.Sequential(nn.Conv3d(1, 2, (5, 3, 3)), nn.ReLU(), nn.Flatten(1, 2), nn.Conv2d(16, 4, 3), nn.ReLU())
    plan = fxstream.plan(model, (12, 40, 40), channels=1, tile=20, segments=1)
    assert plan.streamed_share == 1
    assert [len(segment.axes) for segment in plan.segments] == [2]


def test_a_tile_bounds_the_axes_of_a_value_that_are_those_of_the_image():
    volume = Value("x", (1, 1, 40, 80, 60), torch.float32, (2, 3, 4), True)
    graph = TypedGraph(None, {}, images=(volume,))
    assert tile_bounds(graph, Request(tile=(10, 20, 30)), (20, 40, 30)) == (5, 10, 15)
    assert tile_bounds(graph, Request(tile=(10, 20, 30)), (40, 30)) == (10, 15)
    assert tile_bounds(graph, Request(tile=(10, 20, 30)), (7, 20, 40, 30)) == (7, 5, 10, 15)
    assert tile_bounds(graph, Request(tile=8), (7, 20, 40, 30)) == (8, 4, 4, 4)
    with pytest.raises(fxstream.PlanError, match="2 axes, but the image has 3: give 3"):
        tile_bounds(graph, Request(tile=(20, 30)), (40, 30))
