"""Convolutions of one volume in halves: results and gradients of torch's, by a kernel that is not the slow one."""

import pytest
import torch
from torch import nn

import fxstream
from fxstream.machine.kernels import volumes
from fxstream.machine.kernels.volumes import VOLUME_CONVOLUTION, convolved_in_halves, is_in_halves
from fxstream.machine.meter import measure

CASES = {  # kernel, stride, padding, dilation
    "same": ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "valid": ((3, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    "strided": ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "long strides": ((1, 2, 1), (1, 3, 1), (0, 0, 0), (1, 1, 1)),
    "dilated": ((3, 3, 2), (1, 2, 1), (1, 2, 1), (1, 2, 1)),
    "rows": ((1, 3, 1), (1, 1, 1), (0, 2, 0), (1, 1, 1)),
}


def results(function, image, weight, bias, *numbers):
    """The result and all gradients."""
    inputs = [tensor.clone().requires_grad_() for tensor in (image, weight, bias)]
    result = function(*inputs, *numbers)
    direction = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result.detach(), *torch.autograd.grad(result, inputs, direction)]


@pytest.mark.parametrize("rows", [4, 5, 8, 9])
@pytest.mark.parametrize("case", CASES)
def test_halves_are_the_whole_and_its_gradients(case, rows):
    kernel, *numbers = CASES[case]
    image, weight = torch.randn(1, 2, 4, rows, 6).double(), torch.randn(3, 2, *kernel).double()
    bias = torch.randn(3).double()
    halves = results(convolved_in_halves, image, weight, bias, *numbers)
    for ours, plain in zip(halves, results(torch.ops.aten.conv3d, image, weight, bias, *numbers), strict=True):
        torch.testing.assert_close(ours, plain)


SHAPES = {  # image, weight, whether torch's kernel for it is the slow one
    "few rows": ((1, 16, 3, 426, 8), (16, 16, 3, 3, 3), True),
    "one row more": ((1, 16, 3, 427, 8), (16, 16, 3, 3, 3), False),
    "two volumes": ((2, 16, 3, 64, 64), (16, 16, 3, 3, 3), False),
    "a cube": ((1, 16, 32, 32, 32), (16, 16, 3, 3, 3), True),
    "a large kernel": ((1, 8, 20, 20, 20), (8, 8, 1, 4, 4), False),
    "a long kernel": ((1, 8, 20, 20, 20), (16, 8, 3, 3, 5), True),
}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no other kernel")
@pytest.mark.parametrize("case", SHAPES)
def test_it_is_in_halves_where_torch_takes_the_slow_kernel_for_it(case):
    shape, kernel, is_slow = SHAPES[case]
    image, weight = torch.zeros(shape), torch.zeros(kernel)
    numbers = [1, 1, 1], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1
    slow = torch._C._ConvBackend.Slow3d
    assert is_in_halves(image, weight) == is_slow
    assert (torch._C._select_conv_backend(image, weight, None, *numbers) == slow) == is_slow
    both = torch.cat([image, image])
    assert torch._C._select_conv_backend(both, weight, None, *numbers) != slow


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no other kernel")
def test_small_grouped_and_wide_ones_are_left_to_torch(monkeypatch):
    image, weight = torch.randn(1, 8, 12, 12, 12), torch.randn(16, 8, 3, 3, 3)
    assert is_in_halves(image, weight)
    assert not is_in_halves(image[..., :4, :4], weight)
    assert not is_in_halves(image.double(), weight.double())
    assert not is_in_halves(image[0], weight)
    assert not is_in_halves(image, torch.randn(512, 8, 1, 1, 1))
    monkeypatch.setattr(volumes, "convolved_in_halves", lambda *_: pytest.fail("in halves"))
    grouped = torch.randn(512, 1, 3, 3, 3)
    assert not is_in_halves(image, grouped)
    torch.testing.assert_close(
        VOLUME_CONVOLUTION(image, grouped, groups=8), torch.conv3d(image, grouped, groups=8)
    )
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not is_in_halves(image, weight)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no other kernel")
def test_tiles_of_a_volume_are_in_halves(monkeypatch):
    taken = []
    monkeypatch.setattr(volumes, "convolved_in_halves", lambda *a: taken.append(1) or convolved_in_halves(*a))
    model = nn.Sequential(nn.Conv3d(2, 24, 3, padding=1), nn.ReLU(), nn.Conv3d(24, 8, 3, padding=1))
    image = torch.randn(1, 2, 24, 24, 24)
    module = fxstream.compile(model, tile=16, verify=False)
    torch.testing.assert_close(module(image), model(image), rtol=1e-4, atol=1e-4)
    assert module.plan.segments[0].tile_count == 8
    module(image).sum().backward()
    assert len(taken) >= 8
    streamed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(image).sum().backward()
    for ours, parameter in zip(streamed, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no other kernel")
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_recorded_has_the_same_bits(case):
    kernel, *numbers = CASES[case]
    image, weight = torch.randn(1, 16, 8, 41, 38), torch.randn(24, 16, *kernel)
    assert is_in_halves(image, weight)
    with torch.no_grad():
        unrecorded = VOLUME_CONVOLUTION(image, weight, None, *numbers)
    assert torch.equal(unrecorded, VOLUME_CONVOLUTION(image, weight, None, *numbers))
    torch.testing.assert_close(unrecorded, torch.conv3d(image, weight, None, *numbers), rtol=1e-4, atol=1e-3)


def test_a_program_with_one_is_compiled_as_a_whole():
    compiled = torch.compile(VOLUME_CONVOLUTION, backend="aot_eager", fullgraph=True)
    image, weight = torch.randn(1, 8, 12, 12, 12), torch.randn(16, 8, 3, 3, 3)
    for is_recorded in (False, True):
        with torch.set_grad_enabled(is_recorded):
            torch.testing.assert_close(compiled(image, weight), torch.conv3d(image, weight), rtol=1e-4, atol=1e-4)


class Gated(nn.Module):
    """A map, gated by convolutions of what is left of it where all its voxels are averaged."""

    def __init__(self):
        super().__init__()
        self.near, self.down, self.up = nn.Conv3d(16, 16, 3, padding=1), nn.Conv3d(16, 4, 1), nn.Conv3d(4, 16, 1)

    def forward(self, x):
        y = self.near(x).relu()
        return x + y * self.up(self.down(y.mean((2, 3, 4), keepdim=True)).relu()).sigmoid()


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_convolutions_without_a_map_are_not_in_halves(share):
    """Planning ended in an AssertionError where a span that runs whole had one."""
    model = nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), Gated(), Gated(), Gated(), nn.Conv3d(16, 2, 1))
    image = torch.randn(1, 1, 24, 32, 24)
    whole = measure(lambda: model(image).square().mean().backward())
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    module = fxstream.compile(model, memory=int(share * whole.peak_bytes), verify=False)
    module(image).square().mean().backward()
    assert not module.plan.is_trivial
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_the_plan_expects_less_time_of_halves_than_of_the_slow_kernel():
    model = nn.Sequential(nn.Conv3d(2, 24, 3, padding=1), nn.ReLU(), nn.Conv3d(24, 8, 3, padding=1))
    plans = [fxstream.plan(model, tile=16, inputs=[torch.zeros(n, 2, 24, 24, 24)]) for n in (1, 2)]
    one, two = (plan.prediction.time_ratio for plan in plans)  # torch has a fast kernel for two
    assert one < 0.5 * two
