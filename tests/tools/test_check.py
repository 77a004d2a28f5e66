"""`fxstream.check`: what it compares, and that it leaves the model as it was."""

import pytest
import torch
from torch import nn

import fxstream
from fxstream.tools.check import check


def test_check_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    report = check(model, 40, tile=16, segments=1)
    assert report.ok
    assert len(report.differences) == 1 + 6 + 1 + 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gradient_that_cancels_is_no_difference():
    """A bias in front of batch statistics has a gradient of nothing but rounding."""
    report = check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).train(), 40, tile=16)
    assert report.ok, report


def test_check_needs_weights():
    with torch.device("meta"), pytest.raises(fxstream.InputError, match="meta device"):
        check(nn.Conv2d(3, 4, 3), 40, tile=16)
