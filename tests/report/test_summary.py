"""What a report counts."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxstream
from fxstream.report.summary import summarise


def test_products_of_the_head_are_counted():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, 30, 30))
    assert 2 * summarise(fxstream.analyze(network, 30), "network").macs == counter.get_total_flops()
