"""Random graphs as plain data, their strategies, and the network that such a graph describes.

A graph is a tuple of steps, each an operator with the places of its inputs among the values so far; values are
cropped to a common size where they are joined.
"""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

CHANNELS = 2


class RandomGraph(nn.Module):
    """The network that a tuple of steps describes."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randint(-1, 2, s[2]).double()) for s in steps if s[0] in ("conv", "transposed")
        )
        self.bias = nn.Parameter(torch.randint(-1, 2, (CHANNELS,)).double())

    def forward(self, x):
        values, weights = [x], iter(self.weights)
        for kind, place, *options in self.steps:
            a = values[place % len(values)]
            if kind == "conv":
                values.append(F.conv2d(a, next(weights), self.bias, *options[1:]))
            elif kind == "transposed":
                values.append(F.conv_transpose2d(a, next(weights), self.bias, *options[1:]))
            elif kind == "join":
                b = values[options[0] % len(values)]
                h, w = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
                both = [v[:, :, :h, :w] for v in (a, b)]
                values.append(both[0] + both[1] if options[1] else torch.cat(both, 1)[:, 1 : 1 + CHANNELS])
            else:
                values.append(UNARY[kind](a, *options))
        return tuple(values[-2:]) if self.steps[-1][0] == "join" else values[-1]


def max_pool(x, kernel, stride, padding, dilation, ceil_mode):
    """Max pooling, refused where torch itself writes outside its memory: a window without a real pixel."""
    if any(n < d * (k - 1) + 1 for n, k, d in zip(x.shape[2:], kernel, dilation, strict=True)):
        raise ValueError("the window is larger than the map")
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)


def windows(x, pixels, shift):
    """What mixes the pixels of each window, as window attention does, with what is around it."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % pixels, 0, -height % pixels)).permute(0, 2, 3, 1).roll((-shift, -shift), (1, 2))
    b, h, w, c = x.shape
    y = x.view(b, h // pixels, pixels, w // pixels, pixels, c).transpose(2, 3).reshape(-1, pixels * pixels, c)
    y = y + F.relu(y @ y.clamp(-2, 2).transpose(1, 2)).clamp(max=2) @ y.clamp(-2, 2)
    y = y.view(b, h // pixels, w // pixels, pixels, pixels, c).transpose(2, 3).reshape(b, h, w, c)
    return y.roll((shift, shift), (1, 2))[:, :height, :width].permute(0, 3, 1, 2)


def attention(x, heads):
    """Linear attention without softmax, which would round: every position with every other."""
    q = x.clamp(-2, 2).flatten(2).unflatten(1, (heads, -1))
    mixed = F.relu(q.transpose(-2, -1) @ q).clamp(max=2) @ q.transpose(-2, -1)
    return x + mixed.transpose(-2, -1).reshape(x.shape)


NORMS = {  # of a variance that is at least 1, so that rounding does not grow
    "instance": lambda x: F.instance_norm(x, eps=1.0),
    "batch": lambda x: F.batch_norm(x, None, None, training=True, eps=1.0),
    "group": lambda x: F.group_norm(x, 1, eps=1.0),
    "layer": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (CHANNELS,), eps=1.0).permute(0, 3, 1, 2),
}
UNARY = {
    "relu": F.relu,
    "max_pool": max_pool,
    "avg_pool": lambda x, k, s, p, c, i: F.avg_pool2d(x, k, s, p, c, i) * (k[0] * k[1] if k[0] & k[1] & 1 else 1),
    "up": lambda x, s: F.interpolate(x, scale_factor=s),
    "pad": lambda x, p: F.pad(x, p),
    "shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
    "nhwc": lambda x: x.permute(0, 2, 3, 1).flip(-1).permute(0, 3, 1, 2),
    "stride": lambda x, a, b: x[:, :, a::b],
    "total": lambda x: x - x.sum((2, 3), keepdim=True),
    "circular": lambda x, p: F.pad(x, p, "circular"),
    "roll": lambda x, shifts: x.roll(shifts, (2, 3)),
    "flip": lambda x, dims: x.flip(dims),
    "beside": lambda x, dim: torch.cat([x, 1 - x], dim),
    "rows": lambda x, dim: x - x.sum(dim, keepdim=True),
    "windows": windows,
    "attention": attention,
    "peak": lambda x: x + x.amax((2, 3), keepdim=True),
    "norm": lambda x, over: NORMS[over](x),
}

place = st.integers(0, 7)
pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
kernel = st.tuples(st.just(CHANNELS), st.just(CHANNELS), st.integers(1, 4), st.integers(1, 4))
pooled = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))


@st.composite
def max_pools(draw):
    window = draw(pair(1, 4))
    padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    return ("max_pool", draw(place), window, draw(pair(1, 3)), padding, draw(pair(1, 2)), draw(st.booleans()))


@st.composite
def average_pools(draw):
    window = draw(pooled)
    padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    return ("avg_pool", draw(place), window, draw(pair(1, 3)), padding, draw(st.booleans()), True)


@st.composite
def transposed_convolutions(draw):
    stride = draw(pair(1, 3))
    extra = tuple(draw(st.integers(0, s - 1)) for s in stride)
    padding, dilation = draw(pair(0, 1)), draw(pair(1, 2))
    return ("transposed", draw(place), draw(kernel), stride, padding, extra, 1, dilation)


local_steps = st.one_of(
    st.tuples(st.just("conv"), place, kernel, pair(1, 3), pair(0, 3), pair(1, 3)),
    transposed_convolutions(),
    max_pools(),
    average_pools(),
    st.tuples(st.just("join"), place, place, st.booleans()),
    st.tuples(st.just("relu"), place),
    st.tuples(st.just("up"), place, pair(1, 3)),
    st.tuples(st.just("pad"), place, st.tuples(*[st.integers(-1, 2)] * 4)),
    st.tuples(st.just("shuffle"), place),
    st.tuples(st.just("nhwc"), place),
    st.tuples(st.just("stride"), place, st.integers(0, 2), st.integers(1, 3)),
)
axis = st.sampled_from([2, 3])
far_steps = st.one_of(
    st.tuples(st.just("circular"), place, st.tuples(*[st.integers(0, 2)] * 4)),
    st.tuples(st.just("roll"), place, pair(-3, 3)),
    st.tuples(st.just("flip"), place, st.sampled_from([(2,), (3,), (2, 3)])),
    st.tuples(st.sampled_from(["beside", "rows"]), place, axis),
    st.tuples(st.just("windows"), place, st.integers(2, 4), st.integers(0, 1)),
    st.tuples(st.just("attention"), place, st.sampled_from([1, 2])),
)
"""What reads more than the pixels around: the other end of a map, a whole row, windows, all positions."""
steps = st.one_of(local_steps, st.tuples(st.sampled_from(["total", "peak"]), place))
smooth_steps = st.one_of(
    st.tuples(st.just("norm"), place, st.sampled_from(sorted(NORMS))),
    *(
        steps.filter(
            lambda step: step[0] in ("conv", "transposed", "join", "up", "pad", "stride", "nhwc", "total")
        )
        for steps in (local_steps, steps)
    ),
    far_steps.filter(lambda step: step[0] not in ("windows", "attention")),
)
"""What has no kinks, at which rounding would be another gradient: with normalisations, whose results round."""
smooth_graphs = st.lists(smooth_steps, min_size=1, max_size=8).map(tuple)
local_graphs = st.lists(local_steps, min_size=1, max_size=7).map(tuple)
graphs = st.lists(steps, min_size=1, max_size=7).map(tuple)
far_graphs = st.lists(st.one_of(steps, far_steps), min_size=1, max_size=6).map(tuple)
