"""Tiles that read the same constants are computed once, with the results and gradients of the plain model."""

import copy
import logging

import numpy as np
import pytest
import torch
from compare import assert_same, make_integer, streams
from counted import Counted
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxstream
from fxstream.runtime import backward, equal_tiles, forward
from fxstream.runtime.equal_tiles import constant_values
from fxstream.runtime.tile_run import Inputs
from fxstream.tools.check import step


def slide(*shape, blank=(200, 210, 220), tissue=(0.1, 0.5)):
    """Small integers [H, W, C] in a rectangle, and a constant per channel around it."""
    values = np.empty(shape, np.uint8)
    values[:] = np.resize(blank, shape[-1])
    rows, columns = ((int(a * size), int(b * size)) for size in shape[:2] for a, b in [tissue])
    values[slice(*rows), slice(*columns)] = np.random.default_rng(0).integers(0, 9, values.shape)[
        slice(*rows), slice(*columns)
    ]
    return values


def network(*more, channels=3, last=2):
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, last, 3, padding=1)]
    return make_integer(nn.Sequential(*layers, *more))


def source(array):
    return fxstream.source(array, layout="HWC", dtype=torch.float64)


def tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None].double()


def stepped(module, model, image):
    """Output, gradients and buffers of one step whose output gradient is not constant."""
    model.zero_grad()
    output = module(image)
    weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape) % 7 - 3
    (output * weights).sum().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach(), **named, **{n: b.clone() for n, b in model.named_buffers()}}


def repeated(module):
    return [(stream.schedule.repeated, len(stream.schedule.tasks)) for stream in streams(module)]


def test_a_slide_with_blank_around_its_tissue(monkeypatch, caplog):
    """Equal to the plain model bit by bit; a tile of each class and constant is run, in forward and backward."""
    runs = []
    monkeypatch.setattr(forward.Forward, "_computed", counting(runs, "forward", forward.Forward._computed))
    monkeypatch.setattr(backward.Backward, "_pulled_back", counting(runs, "back", backward.Backward._pulled_back))
    caplog.set_level(logging.INFO, "fxstream")
    model, array = network(), Counted(slide(160, 160, 3))
    module = fxstream.compile(model, tile=21, segments=1)
    found = stepped(module, model, source(array))
    assert_same(found, stepped(model, model, tensor(array.array)), 0.0)
    ((blank, tiles),) = repeated(module)
    assert blank > 0.5 * tiles
    assert runs.count("forward") == runs.count("back") == tiles - blank
    line = f"segment_0: {blank} of {tiles} tiles were blank as another one"
    assert line in str(module.plan)
    assert f"{line}, and took its results" in caplog.messages
    assert (array.counts == 2).mean() < 0.5  # of equal tiles backward reads one


def counting(runs, what, function):
    def counted(*args):
        runs.append(what)
        return function(*args)

    return counted


@pytest.mark.parametrize(
    "more",
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 1, 3)),
        (nn.ConvTranspose2d(2, 2, 3, 2, 1), nn.AvgPool2d(3, 2, 1)),
        (nn.AdaptiveAvgPool2d(1),),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),),
        (nn.Dropout2d(0.5), nn.Conv2d(2, 3, 1)),
    ],
)
@pytest.mark.parametrize("how", [{"segments": 1}, {}])
def test_networks(more, how):
    model, array = network(*more), slide(190, 170, 3)
    module = fxstream.compile(model, tile=37, verify=False, **how)
    torch.manual_seed(1)
    found = stepped(module, model, source(array))
    torch.manual_seed(1)
    assert_same(found, stepped(model, model, tensor(array)), 1e-12)
    assert repeated(module)[0][0] > 5


class Positions(nn.Module):
    """Where a pixel lies is an input of the network."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, image):
        rows = torch.arange(image.shape[2], dtype=image.dtype)[:, None].expand(image.shape[2:])
        return self.conv(torch.cat([image, rows[None, None]], 1))


@pytest.mark.filterwarnings("ignore:Positions is bound to the size:fxstream.StreamingWarning")
@pytest.mark.parametrize("model", [Positions(), nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(0.5))])
def test_what_depends_on_the_position_is_not_shared(model, monkeypatch):
    make_integer(model)
    array, module = slide(120, 120, 3), fxstream.compile(model, tile=25, segments=1, verify=False)
    torch.manual_seed(3)
    found = stepped(module, model, source(array))
    assert [blank for blank, _ in repeated(module)] == [0]
    monkeypatch.setattr("fxstream.runtime.reading.box_readers.constant_values", lambda box, dims: None)
    torch.manual_seed(3)
    assert_same(found, stepped(module, model, source(array)), 0.0)


def test_batch_statistics():
    """Reductions get a row of each tile, equal or not, and the gradients through the statistics are shared too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    ).double()
    array, plain = slide(120, 130, 3), copy.deepcopy(model)
    module = fxstream.compile(model, tile=25, segments=1, global_ops="stream", verify=False)
    assert_same(stepped(module, model, source(array)), stepped(plain, plain, tensor(array)), 1e-10)
    assert len(repeated(module)) > 1
    assert all(blank > 5 for blank, _ in repeated(module))


def test_the_gradient_of_the_image_is_every_tile_its_own():
    model, image = network(), tensor(slide(120, 130, 3)).requires_grad_()
    module = fxstream.compile(model, tile=25, segments=1, verify=False)
    assert_same(step(module, model, (image,), None), step(model, model, (image,), None), 0.0)
    assert repeated(module)[0][0] > 5


def test_boundaries_that_are_constant_too():
    """In host memory values are looked at, in whichever segment."""
    model, array = network(), slide(160, 160, 3)
    module = fxstream.compile(model, tile=25, segments=2, verify=False)
    assert_same(stepped(module, model, source(array)), stepped(model, model, tensor(array)), 0.0)
    assert [blank > 5 for blank, _ in repeated(module)] == [True, True]


def test_graphs_that_are_kept():
    model, array = network(), slide(400, 400, 3)
    module = fxstream.compile(model, memory="2MiB", segments=1, verify=False)
    assert_same(stepped(module, model, source(array)), stepped(model, model, tensor(array)), 0.0)
    (stream,) = streams(module)
    assert stream.plan.kept > 0
    assert stream.schedule.repeated > 0


def test_results_that_are_written_elsewhere():
    """More constants than are kept in mind; the result is on disk and not in memory."""
    array = slide(160, 160, 3)
    for k in range(8):
        array[80:, 20 * k : 20 * k + 20] = k * 20
    array[120:] = 7
    model = network()
    module = fxstream.compile(model, tile=13, segments=1, verify=False)
    out = np.zeros((1, 2, 80, 80))
    fxstream.infer(module, source(array), out=out)
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(out), model(tensor(array)))
    assert repeated(module)[0][0] > 40


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, image, labels):
        return nn.functional.cross_entropy(self.conv(image), labels, reduction="none").mean()


def test_every_input_has_to_be_constant():
    model = make_integer(Weighted())
    array, labels = slide(120, 120, 1), torch.zeros(1, 120, 120, dtype=torch.long)
    module = fxstream.compile(model, tile=15, segments=1, verify=False)
    counts = []
    for _ in range(2):
        model.zero_grad()
        loss = module(source(array), labels.numpy())
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters()} | {"loss": loss.detach()}
        model.zero_grad()
        loss = model(tensor(array), labels)
        loss.backward()
        expected = {n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}
        assert_same(found, expected, 1e-12)
        counts += [blank for blank, _ in repeated(module)]
        labels[:, 60:] = torch.arange(60 * 120).view(60, 120) % 4
    assert counts[0] > counts[1] > 0


def fails_once(function, at):
    """A function that runs out of memory once, in its call number `at`."""
    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("out of memory, as a test")
        return function(*args)

    return failing


@pytest.mark.filterwarnings("ignore:.*ran out of memory:fxstream.StreamingWarning")
@pytest.mark.parametrize("what", ["run", "recorded"])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("last", [(), (nn.AdaptiveAvgPool2d(1),)])
def test_out_of_memory(what, at, last, monkeypatch):
    """Equal tiles are pulled back alone where their sum was too much, and halves have the same results."""
    model, array = network(*last), slide(120, 120, 3)
    expected = stepped(model, model, tensor(array))
    module = fxstream.compile(model, tile=25, segments=1, verify=False)
    module(source(array))
    monkeypatch.setattr(Inputs, what, fails_once(getattr(Inputs, what), at))
    assert_same(stepped(module, model, source(array)), expected, 1e-12 if last else 0.0)
    monkeypatch.undo()
    assert_same(stepped(module, model, source(array)), expected, 1e-12 if last else 0.0)


def test_half_precision_sums():
    """Gradients in bfloat16 are summed in float32; in float16, where sums may overflow, they are not summed."""
    ones = [torch.ones(3, dtype=torch.bfloat16)] * 1000
    assert equal_tiles.summed(ones).tolist() == [1000.0] * 3
    (stream,) = streams(ran(nn.Conv2d(3, 2, 3)))
    assert equal_tiles.may_sum(stream, [False, True, True], [torch.float32])
    assert not equal_tiles.may_sum(stream, [False, True, True], [torch.float16])
    assert not equal_tiles.may_sum(stream, [True, True, True], [torch.float32])


def ran(model):
    module = fxstream.compile(model.double(), tile=25, segments=1, verify=False)
    module(source(slide(60, 60, 3)))
    return module


@torch.library.custom_op("fxstream_tests::sign_of_gradient", mutates_args=())
def sign_of_gradient(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


sign_of_gradient.register_fake(torch.empty_like)
sign_of_gradient.register_autograd(lambda ctx, grad: grad.sign())


def test_an_operator_whose_gradient_is_not_linear():
    fxstream.register_rule("fxstream_tests::sign_of_gradient")(fxstream.rules.pointwise)

    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, image):
            return sign_of_gradient(self.conv(image))

    model, array = make_integer(Signed()), slide(120, 120, 3)
    module = fxstream.compile(model, tile=25, segments=1, verify=False)
    assert_same(stepped(module, model, source(array)), stepped(model, model, tensor(array)), 0.0)
    assert repeated(module)[0][0] > 5


@pytest.mark.parametrize("dtype", ["u1", "?", "i2", "f2", "f4", "f8", "i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_constants_by_their_bits(dtype, order):
    box = torch.from_numpy(np.asarray(np.ones((2, 3, 20, 30)), dtype, order))
    values = constant_values(box, (2, 3))
    assert values == np.ones((2, 3), dtype).tobytes()
    for place in ((1, 2, 19, 29), (0, 1, 7, 3), (0, 0, 0, 0)):
        other = box.clone()
        other[place] = 0
        assert constant_values(other, (2, 3)) is None
    box[:, 1] = 0
    assert constant_values(box, (2, 3)) not in (None, values)
    assert constant_values(box, (1, 2, 3)) is None
    assert constant_values(box, None) is None


def test_zeros_of_two_signs_are_two_values():
    zeros = torch.zeros(1, 1, 4, 4)
    assert constant_values(zeros, (2, 3)) != constant_values(-zeros, (2, 3))
    mixed = zeros.clone()
    mixed[..., 1] = -0.0
    assert constant_values(mixed, (2, 3)) is None
    assert constant_values(torch.full_like(zeros, torch.nan), (2, 3)) is not None


def test_a_fake_tensor_has_no_values():
    with FakeTensorMode():
        assert constant_values(torch.zeros(1, 3, 4, 4), (2, 3)) is None
