"""Tiles that are too small for deep operators: these run whole, and only the first one may refuse."""

import random
import warnings

import pytest
import torch
from compare import assert_streams
from torch import nn

import fxstream
from fxstream.tools import zoo

NETWORKS = (
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "densenet121",
    "convnext_tiny",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "vgg11",
    "deeplabv3_mobilenet_v3_large",
)


def network():
    """The last layers read 33 pixels each, at stride 2."""
    wide = [layer for _ in range(2) for layer in (nn.Conv2d(4, 4, 3, padding=16, dilation=16), nn.Tanh())]
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, 2, 1), nn.Tanh()]
    return nn.Sequential(*stem, *wide).double()


def test_what_needs_more_than_the_tile_runs_whole():
    image = torch.randn(1, 3, 80, 72, dtype=torch.float64, requires_grad=True)
    with pytest.warns(fxstream.StreamingWarning, match=r"tile=24 is too small for `4` .. `7`: these run whole"):
        plan = assert_streams(network(), image, tile=24)
    assert plan.untiled == ("`4` .. `7`",)
    assert [bool(segment.axes) for segment in plan.segments] == [True, False]


def test_what_fits_into_the_tile_runs_in_tiles():
    plan = fxstream.plan(network(), 160, tile=80)
    assert not plan.untiled
    assert all(segment.axes for segment in plan.segments)


@pytest.mark.parametrize("tile", [1, 2])
def test_an_error_remains_where_the_first_operator_does_not_fit(tile):
    with pytest.raises(fxstream.PlanError, match=r"one output pixel of `1`.*reads 3 pixels.*is 3;") as error:
        fxstream.plan(network(), 80, tile=tile)
    assert error.value.least_tile == 3


def test_as_many_segments_as_are_asked_for_need_a_tile_that_they_fit_in():
    with pytest.raises(fxstream.PlanError, match="tile=24 is too small"):
        fxstream.plan(network(), 160, tile=24, segments=1)


def plan_with_a_small_tile(seed):
    """A random tile from one pixel above what the first operator needs, for an image not much larger."""
    chosen = random.Random(seed)
    name = NETWORKS[seed % len(NETWORKS)]
    model = zoo.build(f"torchvision/{name}").eval()
    size, graph = chosen.randint(64, 300), fxstream.analyze(model, 64).graph
    first = next(v for v in graph.verdicts.values() if v.pattern is not None)
    (read,) = first.pattern.reads
    least = read.maps[0].last - read.maps[0].first + 1
    tile = chosen.randint(least + 1, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxstream.StreamingWarning)
        assert fxstream.plan(model, size, tile=tile).segments, (name, size, tile)


@pytest.mark.parametrize("seed", [0, 2])
def test_no_tile_is_refused_that_the_first_operator_fits_in(seed):
    plan_with_a_small_tile(seed)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(200))
def test_campaign_of_small_tiles(seed):
    plan_with_a_small_tile(seed)
