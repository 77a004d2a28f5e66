"""Lifetimes of tensors in plain networks, counted by hand in maps of 400 bytes."""

import pytest
import torch
from compare import backward_step
from small_networks import Function
from torch import nn

import fxstream
from fxstream.machine.meter import measure

MAP = 4 * 10 * 10


def conv(i, o):
    return nn.Conv2d(i, o, 1, bias=False)


NETWORKS = {  # maps at the peak: of a call without gradients, of a step
    # forward: both results of the relu; backward: its result, that of the network and their gradients
    "relu": (nn.Sequential(conv(1, 1), nn.ReLU(), conv(1, 1)), 2, 4),
    # as above where all but the result of the network has four channels, once more without recording
    "wide": (nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 1)), 8, 13),
    # pooled maps are quarters; backward of the pooling: two maps, two quarters of the network's and two more
    "max pool": (nn.Sequential(conv(1, 1), nn.MaxPool2d(2), conv(1, 1)), 1.75, 3),
    # an average needs no map for its backward
    "average pool": (nn.Sequential(conv(1, 1), nn.AvgPool2d(2), conv(1, 1)), 1.25, 2.5),
    # both summands and the sum; the first convolution's result with its gradient, the network's with its own
    "skip": (Function(lambda m, x: (y := m.a(x)) + m.b(y), a=conv(1, 1), b=conv(1, 1)), 3, 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_lifetimes_by_hand(name):
    model, forward, step = NETWORKS[name]
    plans = [fxstream.plan(model, 10, channels=1, memory=2**40, training=training) for training in (False, True)]
    predicted = [plan.prediction.plain_bytes for plan in plans]
    assert predicted[0] == forward * MAP
    assert predicted[1] == pytest.approx(step * MAP, abs=16)  # a weight is 4 or 16 bytes
    image = torch.randn(1, 1, 10, 10)
    backward_step(model, model, image)
    with torch.no_grad():
        assert measure(lambda: model(image)).peak_bytes == predicted[0]
    assert measure(lambda: backward_step(model, model, image)).peak_bytes == pytest.approx(predicted[1], abs=16)


def test_bytes_follow_the_size_the_batch_and_the_type():
    model = nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 1))

    def maps(model, size, **options):
        return fxstream.plan(
            model, size, channels=1, memory=2**40, training=False, **options
        ).prediction.plain_bytes

    once = maps(model, 10)
    assert maps(model, (10, 30)) == 3 * once
    assert maps(model, 10, batch=5) == 5 * once
    assert maps(model.double(), 10) == 2 * once
