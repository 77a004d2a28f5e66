"""What a journal compares of images and weights."""

import numpy as np
import pytest
import torch
from counted import Counted
from torch import nn

import fxstream
from fxstream.io import identity


def test_an_image_is_compared_by_all_of_its_values():
    image = torch.zeros(1, 3, 40, 50)
    other = image.clone()
    other[0, 1, 17, 23] = 1e-30
    assert identity.values_of(image) == identity.values_of(image.clone())
    assert identity.values_of(image) != identity.values_of(other)
    assert identity.values_of(image) == identity.values_of(fxstream.source(image.numpy()))
    assert identity.values_of(torch.zeros(0, 3)) == identity.values_of(torch.zeros(0))


@pytest.mark.parametrize("strip", [1, 1000, 10**6])
def test_strips_make_up_an_image(monkeypatch, strip):
    monkeypatch.setattr(identity, "STRIP", strip)
    array = Counted(np.random.default_rng(0).integers(0, 9, (40, 50, 3), dtype=np.uint8))
    identity.values_of(fxstream.source(array, layout="HWC"))
    assert (array.counts == 1).all()
    assert array.largest <= max(strip, 40 * 3)


def test_samples_of_a_larger_image_are_spread(monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 1000)
    array = Counted(np.random.default_rng(0).integers(0, 9, (900, 700, 3), dtype=np.uint8))
    before = identity.values_of(fxstream.source(array, layout="HWC"))
    assert array.reads == 64
    assert array.largest == 32 * 32 * 3
    assert array.counts[:32, :32].all()
    assert array.counts[-32:, -32:].all()
    array.array[899, 699, 2] += 1
    assert identity.values_of(fxstream.source(array, layout="HWC")) != before


def test_weights_are_compared_with_their_names():
    first, second = nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(1, 2, 3))
    second[0].load_state_dict(first.state_dict())
    assert identity.weights_of(first) == identity.weights_of(nn.Sequential(first)[0])
    assert identity.weights_of(first) != identity.weights_of(second)
    before = identity.weights_of(second)
    with torch.no_grad():
        second[0].bias[1] += 1
    assert identity.weights_of(second) != before
