"""Gradients of one sample whose batch dim has a stride that means nothing, as reshapes leave it."""

import pytest
import torch

from fxstream.machine.kernels.affine import BATCH_NORM
from fxstream.machine.kernels.moments import normalise

SHAPE = (1, 4, 3, 5)
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "rows of channels": lambda t: t.flatten(2).mT.contiguous().mT.view(SHAPE),
    "a sample of channels last": lambda t: t.contiguous(memory_format=torch.channels_last)[0].unsqueeze(0),
    "a part": lambda t: torch.cat([t, t], 3)[..., :5],
    "one number": lambda t: t.new_ones(()).expand(SHAPE),
}


def affine(tensor, scale, shift, centre, unit):
    return BATCH_NORM(tensor, scale, shift, centre, unit, False, 0.0, 0.0, False)


def normalised(tensor, *operands):
    return normalise(tensor, *(operand.view(1, -1) for operand in operands))


@pytest.mark.parametrize("function", [affine, normalised])
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_map", LAYOUTS)
def test_each_layout_of_the_map_and_of_its_gradient(of_map, of_gradient, function):
    tensor, gradient = (LAYOUTS[name](torch.randn(SHAPE).double()) for name in (of_map, of_gradient))
    tensor = tensor.detach().requires_grad_()
    operands = [torch.randn(4).double().requires_grad_() for _ in range(2)]
    centre, unit = torch.randn(4).double(), torch.ones(4).double()
    scale, shift, middle = (one.view(1, 4, 1, 1) for one in (*operands, centre))
    expected = (tensor - middle) * scale + shift
    result = function(tensor, *operands, centre, unit)
    torch.testing.assert_close(result, expected)
    inputs = [tensor, *operands]
    wanted = torch.autograd.grad(expected, inputs, gradient)
    torch.testing.assert_close(torch.autograd.grad(result, inputs, gradient), wanted)


@pytest.mark.parametrize("function", [affine, normalised])
def test_the_result_may_be_written_into(function):
    tensor, gradient = (torch.randn(SHAPE).double() for _ in range(2))
    tensor, operands = tensor.requires_grad_(), [torch.ones(4).double() for _ in range(4)]
    result = function(tensor, *operands).relu_()
    (found,) = torch.autograd.grad(result, tensor, LAYOUTS["rows of channels"](gradient))
    torch.testing.assert_close(found, gradient * (tensor > 0))
