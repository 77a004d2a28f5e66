"""Operators that are local in every spelling: forward and gradients bit by bit, on tiny maps of several tiles."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams, integer_image, make_integer
from small_networks import Function
from torch import nn

import fxstream


def around(function):
    """A network whose middle is `function`, of (module, map)."""

    def forward(m, x):
        return m.b(function(m, F.relu(m.a(x))) * 1.0)

    model = Function(forward, a=nn.Conv2d(2, 4, 3, padding=1), b=nn.LazyConv2d(2, 3, padding=1))
    model.double().register_buffer("k", torch.tensor([2.0]))
    model(torch.zeros(1, 2, 24, 26, dtype=torch.float64))
    return make_integer(model)


LOCAL = {
    "repeat_interleave channels": lambda m, x: x.repeat_interleave(2, 1),
    "repeat_interleave rows": lambda m, x: x.repeat_interleave(3, dim=2),
    "repeat_interleave both": lambda m, x: torch.repeat_interleave(x.repeat_interleave(2, -1), 2, -2),
    "|": lambda m, x: x * ((x > 0) | (x < -1)),
    "&": lambda m, x: x * ((x > 0) & (x < 2)),
    "^": lambda m, x: x * ((x > 0) ^ (x > 1)),
    "~": lambda m, x: x * ~(x > 1),
    "or in place": lambda m, x: x * (x > 0).__ior__(x < -1),
    "and in place": lambda m, x: x * (x > 0).__iand__(x < 2),
    "logical_or in place": lambda m, x: x * (x > 2).logical_or_(x < 1),
    "logical": lambda m, x: x * torch.logical_or(x > 2, torch.logical_not(torch.logical_and(x > 0, x < 2))),
    "logical_xor": lambda m, x: x * x.logical_xor(x > 1),
    "bitwise": lambda m, x: x * torch.bitwise_or(x > 2, torch.bitwise_and(x > 0, torch.bitwise_not(x > 1))),
    "bitwise of numbers": lambda m, x: x * ((x.int() & 3) | 4 ^ (x.int() << 1)),
    "where with a number": lambda m, x: torch.where(x > 1, x, -1.0) + torch.where(x > 2, 3.0, x),
    "where with numbers": lambda m, x: x * torch.where(x > 1, 2.0, -1.0),
    "einsum of one": lambda m, x: torch.einsum("nchw -> nhwc", x).permute(0, 3, 1, 2),
    "channels by a list": lambda m, x: x[:, [3, 0, 0, 2]],
    "channels by a tensor of two dims": lambda m, x: x[:, torch.tensor([[0, 1], [2, 3]])].sum(1),
    "channels by two tensors": lambda m, x: x.unflatten(1, (2, 2))[:, [0, 1, 1], [1, 1, 0]],
    "channels after the map": lambda m, x: x.permute(0, 2, 3, 1)[..., [1, 0, 3, 2]].permute(0, 3, 1, 2),
    "type_as": lambda m, x: x + m.k.type_as(x),
    "to another's type": lambda m, x: x + m.k.to(x),
    "type of a larger map": lambda m, x: x * x.mean((2, 3), keepdim=True).float().type_as(x).sign(),
}


@pytest.mark.filterwarnings("ignore:.*bitwise_and_cpu")  # the probe computes in float64
@pytest.mark.parametrize("name", LOCAL)
def test_all_of_it_streams_bit_by_bit(name):
    model = around(LOCAL[name])
    plan = assert_streams(model, integer_image(1, 2, 24, 26), tile=18, tolerance=0)
    assert fxstream.analyze(model.float(), (24, 26), channels=2).barriers == ()
    assert plan.streamed_share > 0.98


def test_repeats_given_by_a_tensor_are_refused_in_a_sentence():
    model = Function(lambda m, x: x.repeat_interleave(torch.tensor([1, 2, 1]), 1, output_size=4))
    (barrier,) = fxstream.analyze(model, 16).barriers
    assert "repeats each position as often as a tensor says" in str(barrier)


RESIZED = {
    "half": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
    "odd size": lambda x: F.interpolate(x, size=(17, 9), mode="bilinear", antialias=True),
    "enlarged": lambda x: F.interpolate(x, size=(40, 31), mode="bicubic", antialias=True),
    "cubic": lambda x: F.interpolate(x, size=(5, 11), mode="bicubic", antialias=True),
    "area": lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
    "area to a size": lambda x: F.interpolate(x, size=(6, 13), mode="area"),
}


@pytest.mark.filterwarnings("ignore:.*(is bound to the size|not probed)")
@pytest.mark.parametrize("name", RESIZED)
def test_resizing_streams(name):
    model = Function(lambda m, x: RESIZED[name](F.relu(m.a(x))), a=nn.Conv2d(2, 4, 3, padding=1))
    image = torch.randn(2, 2, 24, 26, dtype=torch.float64, requires_grad=True)
    assert assert_streams(model.double(), image, tile=22, tolerance=1e-12).streamed_share > 0.7
    assert fxstream.analyze(model.float(), (24, 26), channels=2).barriers == ()


def test_a_codebook_has_its_gradient():
    """The rows of a codebook nearest to each pixel: what is looked up, and the gradient of every row."""

    def forward(m, x):
        features = m.a(x).permute(0, 2, 3, 1)
        apart = features.pow(2).sum(-1, True) - 2 * features @ m.book.weight.t() + m.book.weight.pow(2).sum(1)
        nearest = m.book(apart.argmin(-1))
        return m.b((nearest + features - features.detach()).permute(0, 3, 1, 2)), nearest - features.detach()

    parts = {"a": nn.Conv2d(2, 4, 3, padding=1), "book": nn.Embedding(5, 4), "b": nn.Conv2d(4, 3, 3)}
    model = Function(forward, **parts).double()
    assert_streams(model, torch.randn(2, 2, 21, 18, dtype=torch.double, requires_grad=True), tile=10)
    assert fxstream.analyze(model.float(), (21, 18), channels=2).barriers == ()
