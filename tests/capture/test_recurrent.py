"""Recurrent layers inside a network, along the rows and columns of a map: part of the graph, computed densely."""

import pytest
import torch
from compare import assert_streams
from torch import nn

import fxstream


class Rows(nn.Module):
    """An LSTM along columns and a GRU along rows, as in Sequencer, between convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        self.down = nn.LSTM(6, 3, bidirectional=True, batch_first=True)
        self.across = nn.GRU(6, 6, batch_first=True)

    def forward(self, x):
        y = self.first(x).relu()
        batch, channels, height, width = y.shape
        down, _ = self.down(y.permute(0, 3, 2, 1).reshape(-1, height, channels))
        across, _ = self.across(y.permute(0, 2, 3, 1).reshape(-1, width, channels))
        down = down.reshape(batch, width, height, channels).permute(0, 3, 2, 1)
        return self.last((down + across.reshape(batch, height, width, channels).permute(0, 3, 1, 2)).relu())


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_what_is_around_recurrent_layers_streams():
    torch.manual_seed(0)
    model = Rows().double()
    image = torch.randn(1, 3, 9, 10, dtype=torch.double, requires_grad=True)
    assert assert_streams(model, image, tile=6, verify=False).streamed_share > 0.5
    barriers = fxstream.analyze(model, (9, 10)).barriers
    assert {barrier.operator for barrier in barriers} >= {"aten::lstm", "aten::gru"}
