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


class Blur(nn.Module):
    """A filter that makes its weights, or has them as a buffer."""

    def __init__(self, of_buffer):
        super().__init__()
        if of_buffer:
            self.register_buffer("kernel", torch.ones(1, 1, 5, 5) / 25)

    def forward(self, x):
        kernel = getattr(self, "kernel", torch.full((1, 1, 5, 5), 0.04, dtype=x.dtype))
        return nn.functional.conv2d(x, kernel).square()


@pytest.mark.parametrize("of_buffer", [False, True])
def test_a_module_without_parameters_is_checked_in_float64(of_buffer):
    report = fxstream.check(Blur(of_buffer), 48, tile=24, channels=1)
    assert report.dtype == torch.float64
    assert report.ok, report
    assert fxstream.check(Blur(of_buffer), 48, tile=24, channels=1, native=True).dtype == torch.float32
