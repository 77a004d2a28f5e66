"""Traces with symbols for the sizes: one serves all sizes at which the comparisons of the code come out alike."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, captures, integer_image, make_integer, step
from torch import nn

import fxstream
from fxstream.capture import trace as tracing
from fxstream.capture.tracing import LongerTraceError


class Reading(nn.Module):
    """Two convolutions, and between them a function that reads sizes."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), function
        self.seen = {}

    def forward(self, x):
        return self.b(self.function(self, F.relu(self.a(x))))


def batch(m, x):
    return x * torch.ones([x.shape[0], *[1] * (x.ndim - 1)], dtype=x.dtype)


def branch(m, x):
    return -x if x.shape[2] * x.shape[3] > 800 else x


def pad(m, x):
    return F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))


def crop(m, x):
    return x[:, :, : min(x.shape[2], 30)]


def half(m, x):
    return F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2)) if x.shape[2] % 2 == 0 else x


def transposed(m, x):
    return m.function.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


transposed.norm = nn.LayerNorm(3).double()


def cached(m, x):
    return x * m.seen.setdefault(x.shape[2:], float(x.shape[3]))


def listed(m, x):
    return x * sum(torch.linspace(0, 1, x.shape[2]).tolist())


def fixed(m, x):
    return x + float(str(x.shape[2]))


def squeezed(m, x):
    return x * 2 if x.mean((2, 3)).squeeze(0).ndim == 1 else x * 3


def contiguous(m, x):
    return x * 2 if x.transpose(0, 1).is_contiguous() else x


def one_image(m, x):
    return x * 2 if x.shape[0] == 1 else x


def broadcast(m, x):
    first = x[:1] * torch.ones(x.shape[0], 1, 1, 1, dtype=x.dtype)
    return x * first.shape[0]


def parity(m, x):
    return x * [2, 3][x.shape[2] % 2]


def member(m, x):
    return x * (2 if x.shape[2] in (18, 24) else 3)


def looped(m, x):
    for i in range(x.shape[2] // 8):
        x = x + i
    return x


def square(m, x):
    return x * (2 if x.shape[2] == x.shape[3] else 3)


def divided(m, x):
    return x * (2 if x.shape[2] % x.shape[0] == 0 else 3)


def merged(m, x):
    batch = x.shape[0]
    return (x.reshape(batch * 3, *x.shape[2:]) if batch > 1 else x[0]).reshape(x.shape)


SIZES = [(1, 2, 20, 24), (1, 2, 33, 21), (2, 2, 26, 31), (3, 2, 41, 18), (1, 2, 50, 37)]
MANY = [
    (1, 2, 20, 24),
    (2, 2, 20, 24),
    (1, 2, 33, 21),
    (3, 2, 26, 26),
    (1, 2, 20, 20),
    (4, 2, 21, 37),
    (1, 2, 41, 18),
]


@pytest.fixture
def traces(monkeypatch):
    """For every run of dynamo whether it had symbols."""
    runs, original = [], tracing._Run

    def run(function, model, inputs, flat):
        made = original(function, model, inputs, flat)
        runs.append(any(hasattr(tensor, "_dynamo_weak_dynamic_indices") for tensor in inputs.args))
        return made

    monkeypatch.setattr(tracing, "_Run", run)
    return runs


def compare(function, sizes=SIZES):
    model = make_integer(Reading(function))
    module = fxstream.compile(model, tile=12, verify=False)
    for size in sizes:
        image = integer_image(*size)
        assert_same(step(module, model, [image]), step(model, model, [image]), 1e-12)
    return fxstream.inspect(module)


@pytest.mark.parametrize("function", [batch, pad])
def test_one_trace_serves_every_size_of_several_images(traces, function):
    streaming = compare(function, [(batch + 1, *size) for batch, *size in SIZES])
    assert len(streaming.calls) == 1
    assert traces == [False, True]


def test_one_image_has_a_trace_of_its_own(traces):
    streaming = compare(batch)
    assert len(streaming.calls) == 2
    assert traces == [False, True, True]


@pytest.mark.filterwarnings("ignore:.*bound to the size")
def test_a_trace_serves_the_sizes_of_one_branch():
    streaming = compare(branch, [(2, 2, 20, 24), (2, 2, 21, 27), (2, 2, 40, 44), (3, 2, 44, 40), (4, 2, 25, 25)])
    assert [call.trace.sizes is None for call in streaming.calls] == [False, False]


@pytest.mark.filterwarnings("ignore:.*bound to the size")
@pytest.mark.parametrize("function", [crop, half, transposed])
def test_what_is_computed_of_sizes_is_seen_at_each(function):
    compare(function)


@pytest.mark.filterwarnings("ignore:.*bound to the size", "ignore:.*is captured for the")
@pytest.mark.parametrize("function", [cached, listed, fixed])
def test_code_that_needs_a_size_as_a_number_is_traced_at_each(function):
    streaming = compare(function)
    assert all(call.trace.sizes is None for call in streaming.calls)
    assert len(streaming.calls) == len({size[2:] for size in SIZES})


def test_another_mode_is_traced_with_symbols_at_once(traces):
    model = make_integer(Reading(lambda m, x: batch(m, x) if m.training else x + x.shape[0]))
    module = fxstream.compile(model, tile=12, verify=False)
    for mode in (True, False):
        model.train(mode)
        for size in SIZES[:2]:
            image = integer_image(*size)
            assert_same(step(module, model, [image]), step(model, model, [image]), 1e-12)
    assert traces == [False, True, True]


@pytest.mark.filterwarnings("ignore:.*bound to the size")
def test_guards_on_sizes_name_the_size_that_has_changed():
    model = Reading(branch).double()
    module = fxstream.compile(model, tile=12, verify=False)
    module(torch.randn(1, 2, 20, 24, dtype=torch.double))
    (call,) = fxstream.inspect(module).calls
    large = (torch.randn(1, 2, 40, 44, dtype=torch.double),)
    assert not call.trace.holds(model, large, {})
    assert "size" in call.trace.changed(model, large, {})


@pytest.mark.filterwarnings("ignore:.*bound to the size", "ignore:.*is captured for the")
@pytest.mark.parametrize(
    "function",
    [squeezed, contiguous, one_image, broadcast, parity, member, looped, square, divided, merged],
)
def test_constants_and_dims_that_hold_for_some_sizes(function):
    compare(function, MANY)


class Frames(nn.Module):
    """A decoder that takes the frames of a video one by one, each with what the one before left behind."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(3, 2, (2, 3, 3))

    def forward(self, x):
        before, frames = None, []
        for i in range(x.shape[2]):
            here = F.relu(self.a(x[:, :, i : i + 1]))
            frames.append(self.b(torch.cat([here if before is None else before, here], 2)))
            before = here
        height, width = frames[0].shape[3:]
        return torch.cat(frames, 2).view(x.shape[0], 2, len(frames), height, width) + 1


@pytest.mark.filterwarnings("ignore:.*of the activations of Frames")
def test_a_loop_over_frames_is_captured_for_each_number_of_them():
    """And for all images and extents; no trace is of so many more frames as the image has rows more."""
    model = make_integer(Frames())
    plain, module = copy.deepcopy(model), fxstream.compile(model, tile=9, verify=False)
    for shape, count in (((1, 2, 3, 20, 16), 1), ((2, 2, 3, 17, 25), 1), ((1, 2, 4, 20, 16), 2)):
        image = integer_image(*shape)
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 0)
        assert captures(module) == count
        assert module.plan.segments


def test_a_longer_trace_ends_early():
    tracer, model = tracing.Tracer(), Frames()
    assert tracer.graph(model, (torch.randn(1, 2, 3, 9, 9),), {}, 100) is not None
    with pytest.raises(LongerTraceError, match="more than 100 nodes"):
        tracer.graph(model, (torch.randn(1, 2, 40, 9, 9),), {}, 100)
