"""Padding by hand: rows of a map, mirrored or not, and constants, put before and after it. Bit by bit."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams, integer_image, make_integer
from small_networks import Function
from torch import nn

import fxstream


def repeated(m, x):
    return torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)


def mirrored(m, x):
    x = torch.cat([x[:, :, 1:4].flip(2), x, x[:, :, -3:-1].flip(2)], 2)
    return torch.cat([x, x[..., -1:].flip(-1)], -1)


def zeros(m, x):
    x = torch.cat([x.new_zeros(x.shape[0], x.shape[1], 2, x.shape[3]), x], 2)
    return torch.cat([x, x.new_ones(*x.shape[:3], 1), m.c.weight[:1, :1, :1].expand(*x.shape[:3], 1)], 3)


def network(function):
    parts = {"a": nn.Conv2d(2, 4, 3, padding=1), "b": nn.Conv2d(4, 2, 3), "c": nn.Conv2d(1, 1, 1)}
    return make_integer(Function(lambda m, x: m.b(function(m, F.relu(m.a(x)))), **parts))


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")  # a strip has fewer rows; one row runs whole
@pytest.mark.parametrize("function", [repeated, mirrored, zeros])
def test_padding_by_hand_streams(function):
    model = network(function)
    plan = assert_streams(model, integer_image(2, 2, 24, 26), tile=18, tolerance=0)
    assert plan.streamed_share > 0.7
    assert fxstream.analyze(model.float(), (24, 26), channels=2).barriers == ()


def around(x, dim):
    """Two pixels of the opposite border at both ends."""
    length = x.shape[dim]
    return torch.cat([x.narrow(dim, length - 2, 2), x, x.narrow(dim, 0, 2)], dim)


FAR = {
    "concatenates along a tiled dim": (
        lambda m, x: torch.cat([torch.cat([x, x * 2], 3), torch.cat([x * 3, x], 3)], 2),
        lambda m, x: around(around(x, 2), 3),
    ),
    "mirrors a tiled dim": (
        lambda m, x: x + x.flip(2, 3),
        lambda m, x: x * x[:, :, 1:].flip(2, 3).sum(),
    ),
    "reads the positions in a grid": (
        lambda m, x: F.grid_sample(
            x,
            F.affine_grid(torch.eye(2, 3)[None].to(x), (1, *x.shape[1:]), False).expand(x.shape[0], -1, -1, -1),
            align_corners=False,
        ),
    ),
    "pads with pixels of the opposite border": (lambda m, x: F.pad(x, (1, 1, 2, 2), mode="circular"),),
}


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize(
    ("why", "function"), [(why, function) for why, functions in FAR.items() for function in functions]
)
def test_what_reads_from_far_apart_ends_the_stream_and_says_why(why, function):
    model = network(function)
    assert why in str(fxstream.analyze(model.float(), (24, 26), channels=2).barriers[0])
    assert_streams(model.double(), integer_image(2, 2, 24, 26), tile=18, tolerance=0, at_least_tiles=1)
