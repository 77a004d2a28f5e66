"""Each wrong use gets one clear exception, and the model and the process are as before."""

import re

import pytest
import torch
from compare import integer_image, make_integer
from torch import nn

import fxstream
from fxstream import CaptureError, InputError, PlanError, StreamError


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 2, 5))


@pytest.fixture
def model():
    """A model whose tensors, modes and the global modes must not change."""
    made = network()
    before = {n: t.clone() for n, t in made.state_dict().items()}
    yield made
    assert all(torch.equal(before[n], t) for n, t in made.state_dict().items())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert made.training


@pytest.mark.parametrize("tile", [0, -3, 2.5, "512", True, (), (8, 0)])
def test_tile_is_not_a_size(model, tile):
    with pytest.raises(InputError, match=r"tile must be a positive int.* found " + re.escape(repr(tile))):
        fxstream.compile(model, tile=tile)


@pytest.mark.parametrize("segments", [0, -1, 1.5, (), (1,)])
def test_segments_are_not_segments(model, segments):
    with pytest.raises(InputError, match="segments must be"):
        fxstream.compile(model, tile=8, segments=segments)


def test_too_many_segments(model):
    with pytest.raises(PlanError, match="1 to 2 segments"):
        fxstream.compile(model, tile=20, segments=7)(torch.randn(1, 3, 30, 30))


def test_not_a_module():
    with pytest.raises(InputError, match=r"needs an nn\.Module, found function"):
        fxstream.compile(lambda x: x, tile=8)


def test_tile_with_wrong_number_of_axes(model):
    with pytest.raises(PlanError, match=r"has 3 axes, but the image has 2"):
        fxstream.compile(model, tile=(8, 8, 8), segments=1)(torch.randn(1, 3, 30, 30))


def test_tile_too_small_names_minimum_and_node(model):
    compiled = fxstream.compile(model, tile=8, segments=1)
    with pytest.raises(
        PlanError, match=r"one output pixel of `2`.*reads 9 pixels.*The smallest tile .* is 9"
    ) as error:
        compiled(torch.randn(1, 3, 30, 30))
    assert "more segments" in str(error.value)
    assert not fxstream.compile(model, tile=9, segments=1)(torch.randn(1, 3, 30, 30)).isnan().any()


def test_unknown_module_in_cut(model):
    with pytest.raises(PlanError, match="no module `layer9` runs in this model; its parts are 0, 1, 2"):
        fxstream.compile(model, tile=20, cut="layer9")(torch.randn(1, 3, 30, 30))


def test_image_smaller_than_the_kernel(model):
    with pytest.raises(CaptureError, match=r"Kernel size can't be greater|cannot run on inputs"):
        fxstream.compile(model, tile=8)(torch.randn(1, 3, 4, 4))
    compiled = fxstream.compile(model, tile=12, verify=False)
    compiled(torch.randn(1, 3, 30, 30))
    with pytest.raises(InputError, match=r"`conv2d_1`.*fails with"):
        compiled(torch.randn(1, 3, 7, 7))


def test_wrong_number_of_channels(model):
    compiled = fxstream.compile(model, tile=12, verify=False)
    compiled(torch.randn(1, 3, 30, 30))
    with pytest.raises(CaptureError, match=r"expected input.* to have 3 channels, but got 1"):
        compiled(torch.randn(1, 1, 30, 30))


def test_zero_size_batch(model):
    with pytest.raises(InputError, match=r"the image is empty: its shape is \[0, 3, 30, 30\]"):
        fxstream.compile(model, tile=12)(torch.randn(0, 3, 30, 30))


def test_no_image(model):
    with pytest.raises(InputError, match="no image among the arguments"):
        fxstream.compile(model, tile=12)(torch.randn(3))


def test_integer_image_into_a_float_network(model):
    advice = r"an input is uint8 and weights are float32: convert it in the model .* dtype=torch\.float32\)$"
    with pytest.raises(CaptureError, match=advice):
        fxstream.compile(model, tile=12)(torch.ones(1, 3, 30, 30, dtype=torch.uint8))
    source = fxstream.source(torch.ones(30, 30, 3, dtype=torch.uint8), layout="HWC")
    with pytest.raises(CaptureError, match=advice):
        fxstream.compile(model, tile=12)(source)


class TwoInputs(nn.Module):
    def forward(self, image, mask):
        return image * mask


def test_an_input_is_missing():
    with pytest.raises(CaptureError) as error:
        fxstream.compile(TwoInputs(), tile=12)(torch.ones(1, 3, 30, 30))
    assert "types: missing a required argument: 'mask'; give all inputs of the model, on the c" in str(error.value)


def test_complex_image(model):
    with pytest.raises(InputError, match="complex"):
        fxstream.compile(model, tile=12)(torch.ones(1, 3, 30, 30, dtype=torch.complex64))


def test_mixed_devices(model):
    with pytest.raises(InputError, match=r"different devices \(cpu, meta\)"):
        fxstream.compile(model, tile=12)(torch.ones(1, 3, 30, 30, device="meta"))


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5)

    def forward(self, x):
        x = self.conv(x)
        if x.sum() > 0:
            x = -x
        return x


def test_data_dependent_control_flow(capsys):
    """One sentence, which does not blame shapes; torch's graph of what it traced so far stays away."""
    model, image = DataDependent(), torch.randn(1, 3, 30, 30)
    with pytest.raises(fxstream.GraphBreakError, match=r"breaks at .*test_errors.py:\d+ \(`if x.sum") as error:
        fxstream.analyze(model, 30)
    assert "shapes and types" not in str(error.value)
    assert capsys.readouterr().err == ""
    with pytest.warns(fxstream.StreamingWarning, match="Its parts are streamed one by one"):
        result = fxstream.compile(model, tile=12)(image)
    assert torch.allclose(result, model(image), rtol=1e-5)


class NothingLocal(nn.Module):
    def forward(self, x):
        return torch.fft.rfft2(x).abs()


def test_nothing_is_local():
    model, x = NothingLocal(), torch.randn(1, 3, 30, 30)
    compiled = fxstream.compile(model, tile=12)
    with pytest.warns(fxstream.StreamingWarning, match="0% of the activations.*whole map"):
        found = compiled(x)
    assert torch.equal(found, model(x))


def test_double_backward(model):
    x = torch.randn(1, 3, 30, 30, requires_grad=True)
    y = fxstream.compile(model, tile=14, verify=False)(x).sum()
    with pytest.raises(StreamError, match="no double backward"):
        torch.autograd.grad(y, x, create_graph=True)


def test_functional_transforms(model):
    compiled = fxstream.compile(model, tile=14, verify=False)
    x = torch.randn(1, 3, 30, 30)
    compiled(x)
    with pytest.raises(StreamError, match=r"torch\.func"):
        torch.func.grad(lambda x: compiled(x).sum())(x)


def test_parameter_changed_in_place_between_forward_and_backward():
    model = network()
    y = fxstream.compile(model, tile=14, verify=False)(torch.randn(1, 3, 30, 30)).sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(StreamError, match=r"`2\.weight` was changed in place between forward and backward"):
        y.backward()


@pytest.mark.parametrize(
    "replaced",
    [
        lambda data: 0.9 * data,
        lambda data: data.clone(),
        lambda data: data.new_zeros(2, *data.shape)[1],
        lambda data: data.transpose(2, 3),
    ],
    ids=["other values", "moved away and back", "a part of a larger one", "in another order"],
)
def test_parameter_given_other_data_between_forward_and_backward(replaced):
    model = network()
    y = fxstream.compile(model, tile=14, verify=False)(torch.randn(1, 3, 30, 30)).sum()
    model[2].weight.data = replaced(model[2].weight.data)
    with pytest.raises(StreamError, match=r"`2\.weight` was given other data between forward and backward"):
        y.backward()


def test_double_backward_refused_leaves_the_graph_usable():
    model = make_integer(network())
    x = integer_image(1, 3, 30, 30)
    y = fxstream.compile(model, tile=14, verify=False)(x).sum()
    with pytest.raises(StreamError):
        torch.autograd.grad(y, x, create_graph=True)
    y = fxstream.compile(model, tile=14, verify=False)(x).sum()
    assert torch.equal(torch.autograd.grad(y, x)[0], torch.autograd.grad(model(x).sum(), x)[0])


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 5), nn.Conv2d(4, 2, 5)

    def forward(self, x):
        y = self.a(x)
        if y.requires_grad:
            y.register_hook(lambda grad: 3 * grad)
        return self.b(y)


def test_gradients_that_a_stream_does_not_have():
    x, model = torch.randn(1, 3, 30, 30), network()
    compiled = fxstream.compile(model, tile=14, verify=False)
    compiled(x)
    model[2].register_full_backward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"`2` \(Conv2d\) has a backward hook"):
        compiled(x)


def test_data_parallel(model):
    with pytest.raises(InputError, match="use DistributedDataParallel"):
        fxstream.compile(model, tile=14)._replicate_for_data_parallel()  # what it calls on several devices


def test_a_whole_shape_as_a_size():
    with pytest.raises(fxstream.InputError, match="size has 4 extents, an image one to 3: batch and channels"):
        fxstream.plan(nn.Conv2d(3, 2, 3), (2, 3, 64, 64), tile=32)
