"""What the program of a tile class shares between the operators of a tile, and what it must not share."""

import torch.nn.functional as F
from compare import assert_streams, integer_image, make_integer
from small_networks import Function, conv

import fxstream


def padded_by(mode):
    return lambda x: F.pad(x, (1, 1, 1, 1), mode)


def test_reads_of_one_map_that_differ_in_their_fill():
    """A convolution pads with 0, a max pooling with -infinity: with the values of a negative map it shows."""
    model = Function(
        lambda m, x: F.max_pool2d(y := m.first(x), 3, 1, 1) + m.second(y),
        first=conv(2, 2, 1),
        second=conv(2, 2, 3, padding=1),
    )
    make_integer(model).first.bias.data.fill_(-20.0)
    assert_streams(model, integer_image(1, 2, 30, 26), tile=7, segments=1, tolerance=0.0, verify=False)


def test_reads_of_one_map_that_differ_in_their_border():
    reflected, repeated = padded_by("reflect"), padded_by("replicate")
    model = make_integer(Function(lambda m, x: m.a(reflected(x)) + m.b(repeated(x)), a=conv(2, 2), b=conv(2, 2)))
    assert_streams(model, integer_image(1, 2, 30, 26), tile=9, segments=1, tolerance=0.0, verify=False)


def test_reads_of_one_map_that_differ_in_their_window():
    parts = {"first": conv(2, 2), "a": conv(2, 2, padding=1), "b": conv(2, 2, 5, padding=2)}
    model = make_integer(Function(lambda m, x: m.a(y := m.first(x)) + m.b(y), **parts))
    assert_streams(model, integer_image(1, 2, 30, 26), tile=15, segments=1, tolerance=0.0, verify=False)


def test_equal_reads_are_shared():
    model = Function(lambda m, x: m.a(y := F.relu(x)) + m.b(y), a=conv(2, 2, padding=1), b=conv(2, 2, padding=1))
    module, image = fxstream.compile(make_integer(model), tile=9, segments=1), integer_image(1, 2, 30, 26)
    module(image)
    (stream,) = (
        part.stream for part in fxstream.inspect(module).last.streamed.modules() if hasattr(part, "stream")
    )
    pads = [program.forward.code.count("aten.constant_pad_nd.default(") for program in stream.schedule.programs]
    assert max(pads) == 1
