"""Operators that read the far end of one axis: that axis is left whole, and tiles are cut along the others."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams
from small_networks import Function
from torch import nn

import fxstream


def panorama(m, x):
    for layer in (m.a, m.b, m.c):
        x = layer(F.pad(F.relu(x), (1, 1, 0, 0), mode="circular"))
    return x


def network(forward, padding=1, last=None) -> nn.Module:
    channels = ((2, 4), (4, 4), (4, last or 4))
    parts = dict(zip("abc", (nn.Conv2d(i, o, 3, padding=padding) for i, o in channels), strict=True))
    return Function(forward, **parts).double()


ALONG_ONE = {
    "circular padding": (panorama, (1, 0), (2,)),
    "roll of rows": (lambda m, x: m.c(m.b(torch.roll(m.a(x), 5, 2))), 1, (3,)),
    "roll of columns": (lambda m, x: m.c(m.b(torch.roll(m.a(x), -3, -1))), 1, (2,)),
    "flip": (lambda m, x: m.c(m.b(torch.flip(m.a(x), (3,)))), 1, (2,)),
    "running sum": (lambda m, x: m.c(m.b(m.a(x).cumsum(2))), 1, (3,)),
}


@pytest.mark.parametrize("name", ALONG_ONE)
def test_the_other_axis_is_tiled(name):
    forward, padding, dims = ALONG_ONE[name]
    model = network(forward, padding)
    plan = assert_streams(model, torch.randn(2, 2, 27, 31, dtype=torch.double, requires_grad=True), tile=12)
    assert plan.streamed_share > 0.9
    analysis = fxstream.analyze(model, (27, 31), channels=2)
    assert analysis.barriers == ()
    assert analysis.graph.value("conv2d").dims == dims


def test_along_both_axes_nothing_is_left_to_tile():
    model = network(lambda m, x: m.c(torch.roll(m.b(torch.roll(m.a(x), 5, 2)), 3, 3)))
    analysis = fxstream.analyze(model, (27, 31), channels=2)
    assert len(analysis.barriers) == 2
    assert analysis.graph.value("conv2d").dims == (2, 3)
    image = torch.randn(1, 2, 27, 31, dtype=torch.double, requires_grad=True)
    with pytest.warns(fxstream.StreamingWarning, match="0% of the activations"):
        assert_streams(model, image, tile=12, at_least_tiles=1)


def test_both_axes_are_tiled_where_one_operator_keeps_little_from_streaming():
    """Smaller tiles are worth more than the stretch before a small map is mirrored."""

    def forward(m, x):
        y = m.b(F.relu(m.b(F.relu(m.b(F.relu(m.a(x)))))))
        return m.c(torch.flip(F.max_pool2d(y, 4), (2,)))

    analysis = fxstream.analyze(network(forward, last=1), (64, 64), channels=2)
    assert [barrier.operator for barrier in analysis.barriers] == ["aten::flip"]
    assert analysis.graph.value("conv2d").dims == (2, 3)


@pytest.mark.parametrize("frames", [2, 5])
def test_frames_are_put_before_those_that_are_there(frames):
    """As a decoder of videos does, that may not look ahead: the frames are whole, and all streams."""

    def forward(m, x):
        for layer in (m.a, m.b, m.c):
            x = F.relu(layer(torch.cat([x[:, :, :1].repeat(1, 1, 2, 1, 1), x], 2)))
        return x

    channels = ((2, 4), (4, 4), (4, 3))
    parts = dict(zip("abc", (nn.Conv3d(i, o, 3, padding=(0, 1, 1)) for i, o in channels), strict=True))
    model = Function(forward, **parts).double()
    image = torch.randn(2, 2, frames, 19, 23, dtype=torch.double, requires_grad=True)
    plan = assert_streams(model, image, tile=12, at_least_tiles=4)
    assert plan.streamed_share == 1.0
    analysis = fxstream.analyze(model, (frames, 19, 23), channels=2)
    assert analysis.barriers == ()
    assert analysis.graph.value("conv3d_1").dims == (3, 4)


@pytest.mark.filterwarnings("ignore:.*is not probed, it mixes the images")
@pytest.mark.parametrize("tile", [8, (1, 12, 12)])
def test_frames_that_are_normalised_one_by_one(tile):
    """Samples of their own for a GroupNorm, whose operands then differ from frame to frame."""

    def forward(m, x):
        x = m.a(x)
        batch, frames = x.shape[0], x.shape[2]
        y = m.norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames))
        return m.b(F.relu(y).transpose(1, 2))

    parts = {"a": nn.Conv3d(2, 4, 3, padding=1), "norm": nn.GroupNorm(2, 4), "b": nn.Conv3d(4, 4, 3, padding=1)}
    model = Function(forward, **parts).double()
    plan = assert_streams(model, torch.randn(1, 2, 3, 20, 20, dtype=torch.double, requires_grad=True), tile=tile)
    assert plan.streamed_share > 0.99


@pytest.mark.parametrize("mode", ["replicate", "reflect"])
def test_frames_are_padded_with_their_ends_and_repeated(mode):
    """Along the frames, which are whole, an operator pads and enlarges by itself; a tile has other borders."""

    def forward(m, x):
        x = F.relu(m.a(F.pad(x, (1, 1, 1, 1, 2, 0), mode=mode)))
        x = F.interpolate(x, scale_factor=(2.0, 1.0, 1.0))
        before = x[:, :, :1].repeat(1, 1, 2, 1, 1)
        x = F.relu(m.b(F.pad(torch.cat([before, x], 2), (1, 1, 2, 0, 0, 0), mode=mode)))
        x = F.interpolate(x, scale_factor=(2.0, 2.0, 2.0))
        return m.c(torch.cat([x[:, :, :1].repeat(1, 1, 2, 1, 1), x], 2))

    parts = dict(zip("abc", (nn.Conv3d(i, o, 3) for i, o in ((2, 4), (4, 4), (4, 3))), strict=True))
    model = Function(forward, **parts).double()
    for batch, frames in ((1, 3), (2, 4)):
        image = torch.randn(batch, 2, frames, 14, 19, dtype=torch.double, requires_grad=True)
        plan = assert_streams(model, image, tile=9)
        assert plan.streamed_share == 1.0


@pytest.mark.parametrize("tile", [12, (12, 40)])
def test_a_map_beside_itself_along_one_axis(tile):
    plan = assert_streams(
        network(lambda m, x: m.c(F.relu(m.b(torch.cat([m.a(x), m.a(x * 2)], 3))))),
        torch.randn(2, 2, 27, 31, dtype=torch.double, requires_grad=True),
        tile=tile,
    )
    assert plan.streamed_share > 0.9
