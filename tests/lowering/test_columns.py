"""Windows as columns, and columns summed up again: bit by bit, at sizes that fit the stride and at others."""

import pytest
import torch.nn.functional as F
from compare import assert_streams, integer_image, make_integer
from small_networks import Function
from torch import nn

import fxstream


def as_channels(m, x):
    return F.unfold(x, 3, padding=1).view(x.shape[0], -1, *x.shape[2:])


def weighed(m, x):
    """A convolution written out."""
    return (m.b.weight.view(4, -1) @ F.unfold(x, 3, dilation=2, stride=2)).sum(-1)


def back(m, x):
    return F.fold(F.unfold(x, 3, padding=1) * 2, x.shape[2:], 3, padding=1)


def back_with_gaps(m, x):
    """Of windows that lie apart; the last rows and columns are in none."""
    columns = F.unfold(x, (2, 3), dilation=(1, 2), stride=(3, 6), padding=(1, 0))
    return F.fold(F.relu(columns), x.shape[2:], (2, 3), (1, 2), (1, 0), (3, 6))


@pytest.mark.parametrize("size", [(24, 26), (23, 31)])
@pytest.mark.parametrize("function", [as_channels, weighed, back, back_with_gaps])
def test_columns_are_local(function, size):
    parts = {"a": nn.Conv2d(2, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 3)}
    model = make_integer(Function(lambda m, x: function(m, F.relu(m.a(x))), **parts))
    plan = assert_streams(model, integer_image(2, 2, *size), tile=14, tolerance=0)
    assert plan.streamed_share > 0.98
    assert fxstream.analyze(model.float(), size, channels=2).barriers == ()


def test_columns_that_leave_the_network_stream_up_to_their_flattening():
    model = make_integer(Function(lambda m, x: F.unfold(F.relu(m.a(x)), 2, stride=2), a=nn.Conv2d(2, 4, 3)))
    assert assert_streams(model, integer_image(1, 2, 24, 26), tile=14, tolerance=0).streamed_share > 0.8


def test_columns_of_unknown_positions_stay_as_they_are():
    def sort(m, x):
        return F.fold(F.unfold(m.a(x), 3, padding=1).sort(-1).values, x.shape[2:], 3, padding=1)

    model = make_integer(Function(sort, a=nn.Conv2d(2, 4, 3, padding=1)))
    analysis = fxstream.analyze(model.float(), (24, 26), channels=2)
    assert "aten::col2im" in {verdict.operator for verdict in analysis.verdicts}
    assert_streams(model.double(), integer_image(1, 2, 24, 26), tile=14, tolerance=0)
