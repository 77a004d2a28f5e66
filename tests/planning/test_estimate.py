"""The prediction of a plan: what is counted at the peak, by hand and against a measurement."""

import pytest
import torch
from compare import backward_step
from torch import nn

import fxstream
from fxstream.machine.meter import measure


def heavy(layers=4, channels=48):
    """Weights that need more memory than a tile does."""
    body = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *body)


def weight_bytes(model):
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_gradients_of_weights_count_twice_where_tiles_add_to_them():
    """Those of one tile, which are a part of the tile, and their sum."""
    model, image = heavy(), torch.randn(1, 3, 64, 64)
    plan = fxstream.plan(model, 64, tile=20, segments=1)
    peak = plan.prediction.peak
    assert peak.weights == weight_bytes(model)
    assert peak.unit > weight_bytes(model)
    module = fxstream.compile(model, tile=20, segments=1, verify=False)
    module(image)
    found = measure(lambda: backward_step(module, model, image)).peak_bytes
    assert plan.prediction.bytes == pytest.approx(found, rel=0.05)


def test_gradients_of_the_weights_of_later_segments_are_there_too():
    """The first segment is the last in backward; those of the second are sums by then."""
    model = nn.Sequential(*heavy(), nn.Conv2d(48, 8, 1), nn.Conv2d(8, 8, 3))
    plan = fxstream.plan(model, 64, tile=40, segments=("5", "6"))
    assert [segment.segment.ends[1] for segment in plan.segments] == ["5", "6"]
    assert plan.prediction.binding == plan.segments[0].segment.name
    assert plan.prediction.peak.weights == weight_bytes(model)


def test_without_gradients_none_are_counted():
    peak = fxstream.plan(heavy(), 64, tile=20, segments=1, training=False).prediction.peak
    assert (peak.weights, peak.gradients, peak.kept) == (0, 0, 0)
