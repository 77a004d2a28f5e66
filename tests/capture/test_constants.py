"""Values that Python asks for while a model is traced, of tensors that depend on no tensor of the call."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, integer_image, make_integer
from small_networks import Function
from torch import nn

import fxstream
from fxstream.tools.check import step


def strides_of_a_head(m, x):
    """Strides are worked out once, and used as numbers."""
    strides = torch.zeros(2)
    for k in range(2):
        strides[k] = 2.0 * (k + 1)
    return x[:, :, :: int(strides.min())] * float(strides.max() / strides[0])


def scalars_of_numpy(m, x):
    """Kept as attributes, and asked for as conditions and numbers."""
    return x.repeat_interleave(int(m.factor), 3) if m.repeats else x[:, :, ::2]


def entries_of_an_array(m, x):
    """An entry is a number, and stays it when the array is written to."""
    array = np.arange(4)
    first, last = array[0], array[-1]
    array[0], array[3] = last, 9
    return x * float(first + 10 * last + 100 * array[0]) + x[:, : int(array[3]) - 5]


def permutation_in_numpy(m, x):
    """As entropy models bring channels to the front, and back."""
    order = np.arange(len(x.shape))
    order[0], order[1] = order[1], order[0]
    back = np.arange(len(x.shape))[np.argsort(order)]
    x = x.permute(*order).contiguous() * torch.arange(4.0).view(4, 1, 1, 1)
    return x.permute(*back).contiguous()


def permutation_in_a_buffer(m, x):
    return x.permute(*m.order).permute(m.order.tolist())


def branch_on_a_buffer(m, x):
    if m.scale.sum() > 1 and m.scale > 0:
        return x * 3
    return x


def size_of_a_kernel(m, x):
    """A kernel whose extent follows from a buffer."""
    k = int(m.scale) * 2 + 1
    return F.avg_pool2d(x, k, 1, k // 2, divisor_override=1)


def item_of_a_buffer(m, x):
    return x * m.scale.item() + torch.tensor([4, 5])[1].item()


FUNCTIONS = [
    strides_of_a_head,
    entries_of_an_array,
    permutation_in_numpy,
    scalars_of_numpy,
    permutation_in_a_buffer,
    branch_on_a_buffer,
    size_of_a_kernel,
    item_of_a_buffer,
]


def network(function):
    parts = {"a": nn.Conv2d(2, 4, 3, padding=1), "b": nn.Conv2d(4, 2, 3, padding=1)}
    model = make_integer(Function(lambda m, x: m.b(function(m, F.relu(m.a(x)))), **parts))
    model.register_buffer("scale", torch.tensor([2.0], dtype=torch.float64))
    model.register_buffer("order", torch.tensor([0, 1, 3, 2]))
    model.repeats, model.factor = np.log2(8) > 2, np.int64(2)
    return model


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_constant_is_a_number_of_the_trace(function):
    model = network(function)
    compiled, plain = fxstream.compile(model, tile=18), copy.deepcopy(model)
    for size in ((24, 26), (30, 28)):
        image = integer_image(1, 2, *size)
        assert_same(step(compiled, model, [image]), step(plain, plain, [image]), 0)
        assert compiled.plan.streamed_share > 0.9


def test_a_value_that_has_changed_is_asked_for_again():
    """In place, behind autograd's back, and by another buffer."""
    model = network(branch_on_a_buffer)
    compiled, image = fxstream.compile(model, tile=18), integer_image(1, 2, 24, 26)
    assert torch.equal(compiled(image), model(image))
    for change in (
        lambda: model.scale.fill_(0),
        lambda: model.scale.data.fill_(5),
        lambda: model.register_buffer("scale", torch.tensor([-1.0], dtype=torch.float64)),
    ):
        change()
        assert torch.equal(compiled(image), model(image))


def test_a_scalar_of_numpy_that_has_changed_is_asked_for_again():
    model = network(scalars_of_numpy)
    compiled, image = fxstream.compile(model, tile=18), integer_image(1, 2, 24, 26)
    for repeats, factor in ((True, 2), (True, 3), (False, 3), (False, 2)):
        model.repeats, model.factor = np.bool_(repeats), np.int64(factor)
        assert torch.equal(compiled(image), model(image))


def test_other_tensors_of_the_model_may_change():
    """A step of training does not trace the model anew where no weight was asked for its value."""
    model = network(item_of_a_buffer)
    compiled, image = fxstream.compile(model, tile=18), integer_image(1, 2, 24, 26)
    compiled(image)
    calls = len(fxstream.inspect(compiled).calls)
    with torch.no_grad():
        model.a.weight += 1
    assert torch.equal(compiled(image), model(image))
    assert len(fxstream.inspect(compiled).calls) == calls


@pytest.mark.parametrize("training", [False, True])
def test_data_of_what_is_computed(training):
    """As fused kernels and quantisers take it: values without a gradient, which writes reach."""

    def forward(m, x):
        x = m.a(x)
        weight = (m.a.weight * 2).data.clone().detach()
        rest = (x.round() - x).data
        x = x + rest
        shown = x.abs() * 1
        shown.data.clamp_(max=3)
        return F.conv2d(x, weight.transpose(0, 1), padding=1) * shown[:, :2]

    model = make_integer(Function(forward, a=nn.Conv2d(2, 4, 3, padding=1))).train(training)
    compiled, image = fxstream.compile(model, tile=18), integer_image(1, 2, 24, 26)
    assert_same(step(compiled, model, [image]), step(model, model, [image]), 0)
    assert compiled.plan.streamed_share > 0.5


def set_entry(limits, x):
    limits[0] = x.max()


def add_to_entry(limits, x):
    limits += x.max()


def add_by_method(limits, x):
    limits[:1].add_(x.max())


def write_result(limits, x):
    torch.add(x.max(), 1, out=limits[0])


@pytest.mark.parametrize("write", [set_entry, add_to_entry, add_by_method, write_result])
def test_what_an_image_was_written_to_is_no_constant(write):
    def forward(m, x):
        limits = torch.zeros(2, dtype=x.dtype)
        write(limits, x)
        return x * 2 if limits.sum() > 1 else x

    with pytest.raises(fxstream.GraphBreakError, match="branching"):
        fxstream.analyze(Function(forward), 16)


def test_a_random_draw_is_no_constant():
    with pytest.raises((fxstream.GraphBreakError, fxstream.InputError)):
        fxstream.analyze(Function(lambda m, x: x * 2 if torch.rand(()) > 0.5 else x), 16)


def test_modes_of_the_thread_stay_as_they_are():
    def forward(m, x):
        with torch.no_grad():
            scale = int(m.scale)
        return m.a(x) * scale

    model = network(forward)
    model._forward = forward
    fxstream.analyze(model.float(), 16, channels=2)
    assert torch.is_grad_enabled()
