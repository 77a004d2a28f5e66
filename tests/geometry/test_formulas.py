"""Shapes by formulas, against torch on tensors without memory."""

import pytest
import torch
from torch import nn

import fxstream
from fxstream.geometry.formulas import FORMULAS, broadcast

aten = torch.ops.aten
CASES = {
    "strides": ("conv2d", lambda n: [(2, 3, n, n + 1), (4, 3, 3, 5), None, [2, 1], [1, 2], [1, 2]]),
    "groups": ("conv2d", lambda n: [(1, 4, n, n), (8, 2, 2, 2), None, [1, 1], [0, 0], [1, 1], 2]),
    "ceil": ("max_pool2d", lambda n: [(1, 2, n, n), [3, 2], [2, 2], [1, 1], [1, 1], True]),
    "floor": ("max_pool2d", lambda n: [(1, 2, n, n), [3, 3], [], [0, 1], [2, 1]]),
    "average": ("avg_pool2d", lambda n: [(1, 2, n, n), [3, 3], [2, 2], [1, 1], True]),
    "transposed": (
        "conv_transpose2d",
        lambda n: [(1, 2, n, n), (2, 3, 4, 3), None, [3, 2], [1, 0], [1, 0], 1, [1, 2]],
    ),
    "view": ("view", lambda n: [(2, 3, n), [2, -1]]),
    "mean": ("mean", lambda n: [(2, 3, n, n), [2, -1], True]),
    "linear": ("linear", lambda n: [(2, n, 3), (5, 3)]),
    "permute": ("permute", lambda n: [(2, 3, n), [2, 0, 1]]),
    "transpose": ("transpose", lambda n: [(2, 3, n), 0, -1]),
}


@pytest.mark.parametrize("name", CASES)
def test_formulas_agree_with_torch(name):
    operator, arguments = CASES[name]
    for n in range(5, 24):
        args = arguments(n)
        tensors = [torch.empty(a, device="meta") if isinstance(a, tuple) else a for a in args]
        assert FORMULAS[f"aten::{operator}"](*args) == tuple(getattr(aten, operator)(*tensors).shape)


def test_what_does_not_fit_has_no_formula():
    assert FORMULAS["aten::conv2d"]((1, 3, 2, 2), (4, 3, 3, 3)) is None
    assert FORMULAS["aten::cat"]([(1, 2, 3), (1, 2, 4)], 1) is None
    assert FORMULAS["aten::view"]((2, 3), [4, -1]) is None
    assert broadcast((2, 3), (2, 4)) is None


def test_a_size_that_an_operator_refuses_is_named_after_another_was_accepted():
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 5))
    module = fxstream.compile(model, tile=8, verify=False)
    module(torch.zeros(1, 3, 12, 12))
    with pytest.raises((fxstream.InputError, RuntimeError), match="ernel size"):
        module(torch.zeros(1, 3, 7, 7))
