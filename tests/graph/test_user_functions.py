"""Autograd functions of the user: local where forward and backward are, by the rules of what they are made of."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_streams, streams
from small_networks import Doubled, Function
from torch import nn

import fxstream
from fxstream.runtime.equal_tiles import may_sum
from fxstream.tools.check import step


class NormalisedChannels(torch.autograd.Function):
    """LayerNorm over channels, as NAFNet has it."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.eps = eps
        c = x.size(1)
        mu = x.mean(1, keepdim=True)
        var = (x - mu).pow(2).mean(1, keepdim=True)
        y = (x - mu) / (var + eps).sqrt()
        ctx.save_for_backward(y, var, weight)
        return weight.view(1, c, 1, 1) * y + bias.view(1, c, 1, 1)

    @staticmethod
    def backward(ctx, gradient):
        c = gradient.size(1)
        y, var, weight = ctx.saved_tensors
        g = gradient * weight.view(1, c, 1, 1)
        mean_g, mean_gy = g.mean(dim=1, keepdim=True), (g * y).mean(dim=1, keepdim=True)
        gx = 1.0 / torch.sqrt(var + ctx.eps) * (g - y * mean_gy - mean_g)
        of_weight = (gradient * y).sum(dim=3).sum(dim=2).sum(dim=0)
        return gx, of_weight, gradient.sum(dim=3).sum(dim=2).sum(dim=0), None


class LayerNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return NormalisedChannels.apply(x, self.weight, self.bias, 1e-6)


def restoring(m, x):
    """A block of NAFNet: simple gates, and channel attention."""
    x = m.first(x)
    y = m.gate(m.wide(m.norm(x)))
    a, b = y.chunk(2, 1)
    y = a * b
    x = x + m.back(y * m.attention(y.mean((2, 3), keepdim=True)))
    a, b = m.wider(m.second(x)).chunk(2, 1)
    return m.last(x + a * b)


def test_a_block_of_a_restoring_network_streams_with_its_own_backward():
    model = Function(
        restoring,
        first=nn.Conv2d(3, 6, 3, padding=1),
        norm=LayerNorm2d(6),
        wide=nn.Conv2d(6, 12, 1),
        gate=nn.Conv2d(12, 12, 3, padding=1, groups=12),
        attention=nn.Conv2d(6, 6, 1),
        back=nn.Conv2d(6, 6, 1),
        second=LayerNorm2d(6),
        wider=nn.Conv2d(6, 12, 1),
        last=nn.Conv2d(6, 3, 3, padding=1),
    )
    assert fxstream.analyze(model, (33, 26)).barriers == ()
    for size in ((33, 26), (24, 41)):
        image = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
        assert assert_streams(model.double(), image, tile=20).streamed_share > 0.98


class Clipped(torch.autograd.Function):
    """Its backward is not linear: those of two parts of a gradient do not add up."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-3, 1e-3)


class Averaged(torch.autograd.Function):
    """Its forward is local, its backward takes the mean of all gradients."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean((2, 3), keepdim=True)


class Shifted(torch.autograd.Function):
    """Each pixel is the one before it."""

    @staticmethod
    def forward(ctx, x):
        return F.pad(x, (1, 0))[..., :-1]

    @staticmethod
    def backward(ctx, gradient):
        return F.pad(gradient, (0, 1))[..., 1:]


class Offset(torch.autograd.Function):
    """Its backward adds a constant, which overlapping tiles would add several times."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 1e-3


class MeanOfGradients(torch.autograd.Function):
    """The gradient of its weight is no sum over positions."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight.view(1, -1, 1, 1), (gradient * x).amax((0, 2, 3))


REFUSED = {
    "clamp` in its backward may not be linear": lambda m, x: Clipped.apply(x),
    "mean` is no sum over positions": lambda m, x: Averaged.apply(x),
    "reads other pixels than its own": lambda m, x: Shifted.apply(x),
    "add` in its backward may not be linear": lambda m, x: Offset.apply(x),
    "amax` is no sum over positions": lambda m, x: MeanOfGradients.apply(x, m.a.bias),
}


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("why", REFUSED)
def test_a_function_that_cannot_be_shown_to_be_local_is_computed_whole_and_says_why(why):
    model = Function(
        lambda m, x: m.b(REFUSED[why](m, F.relu(m.a(x)))),
        a=nn.Conv2d(3, 4, 3, padding=1),
        b=nn.Conv2d(4, 2, 3, padding=1),
    )
    assert why in str(fxstream.analyze(model, 24).barriers[0])
    plain, compiled = copy.deepcopy(model.double()), fxstream.compile(model, tile=16)
    image = torch.randn(2, 3, 24, 26, dtype=torch.float64, requires_grad=True)
    assert_same(step(compiled, model, [image]), step(plain, plain, [image]), 1e-10)


def test_equal_tiles_are_not_summed_through_a_function_of_the_user():
    parts = {"a": nn.Conv2d(2, 4, 3, padding=1), "b": nn.Conv2d(4, 2, 3, padding=1)}
    for forward, may in ((lambda m, x: m.b(Doubled.apply(m.a(x))), False), (lambda m, x: m.b(m.a(x) * 2), True)):
        module = fxstream.compile(Function(forward, **parts), tile=12, segments=1)
        module(torch.randn(1, 2, 40, 40))
        stream = streams(module)[0]
        assert may_sum(stream, [False] * len(stream.labels), [torch.float32]) == may
