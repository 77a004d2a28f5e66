"""Context variables that a model's forward sets and reads, and other spellings: one graph, plain's numbers."""

import contextvars
import copy

import pytest
import torch
from compare import assert_same
from small_networks import Function
from torch import nn

import fxstream
from fxstream.tools.check import step

SCALE = contextvars.ContextVar("scale", default=None)
COLLECTED = contextvars.ContextVar("collected", default=None)
IMAGE = (1, 2, 20, 24)


def net(forward) -> nn.Module:
    torch.manual_seed(0)
    return Function(forward, a=nn.Conv2d(2, 3, 3), b=nn.Conv2d(3, 3, 3)).double()


def compared(model, module, calls=1):
    """A step of the compiled module and of a copy of its model."""
    for _ in range(calls):
        image = torch.randn(IMAGE, dtype=torch.double, requires_grad=True)
        plain = copy.deepcopy(model)
        expected = step(plain, plain, [image])
        assert_same(step(module, model, [image]), expected, 1e-10)


def collecting(m, x):
    """As transformers collects the features of its layers: a list that hooks append to while the call runs."""
    token = COLLECTED.set({"features": []})
    try:
        y = m.b(torch.relu(m.a(x)))
        collected = COLLECTED.get()
    finally:
        COLLECTED.reset(token)
    assert COLLECTED.get() is None
    return y, *collected["features"]


def test_what_is_set_is_seen_until_it_is_reset():
    model = net(collecting)
    for layer in (model.a, model.b):
        layer.register_forward_hook(lambda layer, args, output: COLLECTED.get()["features"].append(output))
    module = fxstream.compile(model, tile=12, verify=False)
    compared(model, module, calls=2)
    assert len(fxstream.inspect(module).calls) == 1


def nested(m, x):
    outer = SCALE.set(2.0)
    inner = SCALE.set(5.0)
    y = m.a(x) * SCALE.get()
    SCALE.reset(inner)
    y = m.b(y) * SCALE.get()
    SCALE.reset(outer)
    return y * SCALE.get(7.0)


def test_sets_within_sets():
    model = net(nested)
    module = fxstream.compile(model, tile=12, verify=False)
    compared(model, module)
    assert len(fxstream.inspect(module).calls) == 1


def scaled(m, x):
    y = m.b(torch.relu(m.a(x)))
    return y if SCALE.get() is None else y * SCALE.get()


def test_a_value_from_outside_is_looked_at_again():
    model = net(scaled)
    module = fxstream.compile(model, tile=12, verify=False)
    for scale, traces in [(None, 1), (3.0, 2), (3.0, 2), (4.0, 3), (4, 4), (None, 4)]:
        token = SCALE.set(scale)
        compared(model, module)
        SCALE.reset(token)
        assert len(fxstream.inspect(module).calls) == traces


def left_set(m, x):
    y = m.b(torch.relu(m.a(x))) * (SCALE.get(None) or 1.0)
    SCALE.set(2.0 * (SCALE.get(None) or 1.0))
    return y


@pytest.mark.filterwarnings("ignore:.*bound to the size")
def test_a_variable_that_stays_set_is_set_in_every_call():
    model = net(left_set)
    module = fxstream.compile(model, tile=12, verify=False)

    def calls():
        image = torch.ones(IMAGE, dtype=torch.double)
        with pytest.warns(fxstream.StreamingWarning, match="`scale` is set and not reset in the same call"):
            return [module(image) for _ in range(2)], SCALE.get()

    (first, second), scale = contextvars.copy_context().run(calls)
    expected = model.b(torch.relu(model.a(torch.ones(IMAGE, dtype=torch.double))))
    assert_same({"first": first, "second": second}, {"first": expected, "second": 2 * expected}, 1e-10)
    assert scale == 4.0


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_variables
        return 3 * x.square() * gradient


def as_scripted(m, x):
    y = m.a(x)
    return m.b(y) if torch.jit.isinstance(y, torch.Tensor) and not torch.jit.isinstance(m, nn.Conv2d) else x


@pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated")
@pytest.mark.parametrize("forward", [lambda m, x: m.b(Cubed.apply(m.a(x))), as_scripted])
def test_other_spellings_are_traced(forward):
    model = net(forward)
    module = fxstream.compile(model, tile=12, verify=False)
    compared(model, module)
    assert len(fxstream.inspect(module).calls) == 1
    assert module.plan.streamed_share > 0.9
