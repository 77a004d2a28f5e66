"""Circular padding and rolls are moved up to one wide copy of a map, behind which all streams. Bit by bit."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams, integer_image, make_integer
from small_networks import Function
from torch import nn

import fxstream


def conv(i, o, kernel=3, **options):
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, padding_mode="circular", **options)


def style(m, x):
    """As decoders that make seamless textures: residual blocks at two resolutions."""
    x = m.a(x)
    x = x + m.c(F.relu(m.b(F.relu(x))))
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return m.e(F.relu(m.d(x)))


def uneven(m, x):
    """Pads of two sizes, a skip over them, and what follows from the size of a padded map."""
    y = m.f(F.pad(F.relu(m.f(F.pad(x, (2, 1, 0, 3), "circular"))), (0, 3, 2, 1), "circular"))
    return y * x + y.shape[2]


def differences(m, x):
    """A Laplacian with periodic borders, twice."""
    for _ in range(2):
        x = sum(x.roll(shift, dim) for shift in (1, -1) for dim in (2, 3)) - 4 * x
    return m.g(x)


def inner(m, x):
    """A padded map that is padded again is periodic in another way."""
    x = m.f(F.pad(x, (1, 2, 1, 2), "circular"))
    return m.f(F.pad(F.pad(x, (1, 1, 1, 1), "circular"), (2, 2, 2, 2), "circular"))


LAYERS = {
    "a": conv(2, 4),
    "b": conv(4, 4, 5),
    "c": conv(4, 4),
    "d": conv(4, 3),
    "e": conv(3, 2),
    "f": nn.Conv2d(2, 2, 4),
    "g": nn.Conv2d(2, 2, 3, padding=1),
}
NETWORKS = {"style": (style, "abcde"), "uneven": (uneven, "f"), "differences": (differences, "g")}
TILES = [("style", 16), *((name, tile) for name in ("uneven", "differences") for tile in (9, (12, 24)))]


def network(forward, names):
    torch.manual_seed(0)
    return make_integer(Function(forward, **{name: LAYERS[name] for name in names}))


@pytest.mark.parametrize("shape", [(1, 2, 24, 22), (2, 2, 13, 17)])
@pytest.mark.parametrize("name, tile", TILES)
def test_one_wide_copy_and_everything_streams(name, tile, shape):
    model = network(*NETWORKS[name])
    plan = assert_streams(model, integer_image(*shape), tile=tile, tolerance=0)
    assert plan.streamed_share > 0.7  # the image is small, and its wide copy counts
    barriers = fxstream.analyze(model, shape[2:], channels=2).barriers
    assert [barrier.operator for barrier in barriers] == ["fxstream::wrapped"]


@pytest.mark.parametrize("layer, shape", [(nn.Conv1d, (2, 2, 50)), (nn.Conv3d, (1, 2, 12, 13, 14))])
def test_in_one_and_three_dimensions(layer, shape):
    torch.manual_seed(0)
    first = layer(2, 3, 3, padding=1, padding_mode="circular")
    last = layer(3, 2, 5, padding=2, padding_mode="circular")
    model = make_integer(nn.Sequential(first, nn.ReLU(), last))
    assert_streams(model, integer_image(*shape), tile=10, tolerance=0)
    (barrier,) = fxstream.analyze(model, shape[2:], channels=2).barriers
    assert barrier.operator == "fxstream::wrapped"


@pytest.mark.parametrize("size", [(3, 5), (5, 3), (2, 9)])
def test_maps_that_are_smaller_than_what_is_needed_beyond_them(size):
    model = network(lambda m, x: m.c(m.b(m.b(m.b(m.a(x))))), "abc")
    captured, image = fxstream.analyze(model, (24, 24), channels=2).captured, integer_image(1, 2, *size)
    tensors = dict(model.named_parameters())
    (rewritten,) = captured.module(*[tensors[name] for name in captured.tensors], image)
    assert torch.equal(rewritten, model(image))
    assert [node.target for node in captured.graph.nodes].count(torch.ops.fxstream.wrapped.default) == 1


@pytest.mark.parametrize("extent", [1, 2, 5])
def test_a_wide_copy(extent):
    image = torch.arange(2.0 * extent).view(2, extent).requires_grad_()
    wide = torch.ops.fxstream.wrapped(image, [1], [7], [3])
    assert torch.equal(wide, image[:, torch.arange(-7, extent + 3) % extent])
    (gradient,) = torch.autograd.grad(wide.sum(), image)
    assert torch.equal(gradient[0], torch.bincount(torch.arange(-7, extent + 3) % extent).float())


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_map_that_is_padded_twice_keeps_its_second_padding():
    model = network(inner, "f")
    analysis = fxstream.analyze(model, (16, 16), channels=2)
    assert sorted(barrier.operator for barrier in analysis.barriers) == ["aten::pad", "fxstream::wrapped"]
    assert_streams(model, integer_image(1, 2, 16, 18), tile=16, tolerance=0, at_least_tiles=1)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("size", [(16, 16), (15, 17)])
def test_a_stride_is_not_followed(size):
    """It divides some sizes only."""
    torch.manual_seed(0)
    model = make_integer(nn.Sequential(conv(2, 3), conv(3, 3, stride=2), conv(3, 3), conv(3, 2)))
    assert_streams(model, integer_image(1, 2, *size), tile=14, tolerance=0, at_least_tiles=1)
    barriers = fxstream.analyze(model, size, channels=2).barriers
    assert [barrier.operator for barrier in barriers] == ["fxstream::wrapped"] * 2


def test_one_capture_serves_all_sizes():
    model = network(style, "abcde")
    compiled = fxstream.compile(model, tile=20)
    for size in ((24, 22), (13, 17), (30, 9)):
        image = integer_image(1, 2, *size)
        assert torch.equal(compiled(image), model(image))


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_what_is_made_of_positions_is_not_followed():
    """It has the extents of the map and is no map."""

    def forward(m, x):
        places = torch.arange(x.shape[3]).to(x).expand(1, 1, x.shape[2], -1)
        return m.c(F.relu(m.c(m.c(F.relu(m.a(x))) * places)))

    model = network(forward, "ac")
    assert_streams(model, integer_image(1, 2, 24, 22), tile=12, tolerance=0)
    barriers = fxstream.analyze(model, (24, 22), channels=2).barriers
    assert [barrier.operator for barrier in barriers] == ["fxstream::wrapped"] * 2


def test_random_maps_are_not_periodic():
    model = network(lambda m, x: m.c(F.dropout(m.c(F.dropout(m.a(x), 0.5)), 0.5)), "ac")
    barriers = fxstream.analyze(model, (24, 24), channels=2).barriers
    assert sum(barrier.operator == "aten::pad" for barrier in barriers) == 3


def test_the_report_names_the_line_that_pads():
    (barrier,) = fxstream.analyze(network(style, "abcde"), (24, 24), channels=2).barriers
    assert barrier.place == "a"
    assert str(barrier).startswith("global: `a` (fxstream::wrapped) pads with pixels of the opposite border")
