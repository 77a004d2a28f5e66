"""Writes through views: the captured graph is functional, and streams where the writes are local."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_streams, integer_image, make_integer
from small_networks import Function
from torch import nn

import fxstream
from fxstream.tools.check import step


def shifted(m, x):
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    return y + x


def one_channel(m, x):
    y = x * 2
    y[:, 0] += 1
    y[:, -1] = y[:, 0] + x[:, 1]
    return y


def every_second(m, x):
    y = x * 1
    y[:, :, 1:-1, ::2] *= 3
    y[:, 1:, 2::3, 1::2] = x[:, :-1, 2::3, 1::2]
    return y


def borders(m, x):
    y = x * 1
    y[:, :, 0] = 5
    y[..., -1:] = x[..., -1:]
    y[:, :, -3:, :] = 0.0
    y[:, :, :, 1].zero_()
    return y


def other_views(m, x):
    """Views that were taken before, and are read later."""
    y = x * 1
    rows, flipped, middle = y[:, :, 1:], y.transpose(2, 3), y[:, :, 2:-2]
    middle += 1
    flipped[:, :, 0] = 7
    rows.mul_(2)
    return F.pad(rows, (0, 0, 0, 1)) + flipped.transpose(2, 3) * y


def whole_and_part(m, x):
    y = x * 1
    first = y[:, :1]
    y += 1
    first -= x[:, 1:2]
    return y * first


def permuted(m, x):
    y = x * 1
    y.permute(0, 2, 3, 1)[..., 1:3] += 2
    y.unsqueeze(2)[:, 2] = 1
    return y


def of_constants(m, x):
    """A mask of regions, as that of shifted windows."""
    mask = torch.zeros(x.shape[2:], dtype=x.dtype)
    mask[:-3] = 1
    mask[:, 2:] += 2
    return x * mask


def of_a_condition(m, x):
    y = x * 1
    y[y > 1] = 0
    y[:, 1:][x[:, :-1] > 2] = 4
    return y


FUNCTIONS = [
    shifted,
    one_channel,
    every_second,
    borders,
    other_views,
    whole_and_part,
    permuted,
    of_constants,
    of_a_condition,
]


@pytest.mark.filterwarnings("ignore:.*not probed")  # a strip has no row to write to, a mask no batch
@pytest.mark.parametrize("function", FUNCTIONS)
def test_writes_into_slices_stream_bit_by_bit(function):
    parts = {"a": nn.Conv2d(2, 4, 3, padding=1), "b": nn.Conv2d(4, 2, 3, padding=1)}
    model = make_integer(Function(lambda m, x: m.b(function(m, F.relu(m.a(x)))), **parts))
    plan = assert_streams(model, integer_image(2, 2, 24, 26), tile=16, tolerance=0)
    assert plan.streamed_share > 0.95
    assert fxstream.analyze(model.float(), (24, 26), channels=2).barriers == ()


def test_a_write_into_a_slice_of_an_argument_is_one_in_the_call():
    def forward(m, x):
        x[:, 0, 1:] = 3
        return m.a(x) + x[:, :1]

    model = make_integer(Function(forward, a=nn.Conv2d(2, 2, 3, padding=1)))
    image = integer_image(1, 2, 24, 26, requires_grad=False)
    plain, streamed = image.clone(), image.clone()
    compiled = fxstream.compile(model, tile=16)
    with pytest.warns(fxstream.StreamingWarning, match="changed in place"):
        result = compiled(streamed)
    assert torch.equal(result, model(plain))
    assert torch.equal(plain, streamed)
    assert not torch.equal(plain, image)


def test_a_view_that_is_not_undone_stays_in_place():
    def forward(m, x):
        y = m.a(x)
        y.view(2, -1)[0] += 1
        return y

    model = make_integer(Function(forward, a=nn.Conv2d(2, 2, 3, padding=1)))
    assert "changed in place" in str(fxstream.analyze(model.float(), 24, channels=2, batch=2).barriers[0])
    compiled, image = fxstream.compile(model.double(), tile=16), integer_image(2, 2, 24, 24)
    with pytest.warns(fxstream.StreamingWarning):
        streamed = step(compiled, model, [image])
    assert_same(streamed, step(model, model, [image]), 0)
