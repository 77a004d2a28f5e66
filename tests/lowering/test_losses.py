"""Losses inside the module: streamed against plain, and no logits of the image's size are ever held."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_streams, captures
from small_networks import Function, conv
from torch import nn

import fxstream
from fxstream.capture.capture import capture
from fxstream.graph.shapes import stream_dims
from fxstream.machine.meter import measure
from fxstream.tools.check import step


def image(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


def test_a_mask_beside_an_image_has_its_stream_axes():
    assert stream_dims([(2, 3, 9, 8), (2, 9, 8), (2, 9, 7), (2, 1, 9, 8), (2, 7)]) == [
        (2, 3),
        (1, 2),
        (2,),
        (2, 3),
        (),
    ]
    assert stream_dims([(2, 1, 9)]) == [(2,)]
    assert stream_dims([(2, 1, 9, 8, 7), (2, 9, 8, 7)]) == [(2, 3, 4), (1, 2, 3)]
    assert stream_dims([]) == []


def test_a_mask_beside_an_image_does_not_bind_the_capture_to_its_size():
    model = Function(lambda m, x, y: m.a(x) * y.unsqueeze(1), a=conv(2, 3, padding=1)).double()
    captured, _ = capture(model, (image(1, 2, 20, 20), torch.zeros(1, 20, 20)), {})
    assert not captured.bound
    compiled = fxstream.compile(model, tile=9)
    for batch, height, width in ((1, 20, 20), (2, 20, 20), (3, 31, 17)):
        x, mask = image(batch, 2, height, width), torch.rand(batch, height, width).double()
        assert torch.allclose(compiled(x, mask), model(x, mask), atol=1e-12)
        assert compiled.plan.streamed_share == 1
    assert captures(compiled) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_masks_and_images_of_several_resolutions(batch):
    def forward(m, x, small, mask, other):
        return F.interpolate(m.b(small), scale_factor=2) * mask + m.a(x) * other.unsqueeze(1)

    model = Function(forward, a=conv(2, 3, padding=1), b=conv(1, 3, padding=1)).double()
    mask, other = image(batch, 1, 22, 26), torch.randint(0, 2, (batch, 22, 26)).bool()
    plan = assert_streams(
        model, image(batch, 2, 22, 26), image(batch, 1, 11, 13), mask, other, tile=9, verify=batch == 1
    )
    assert plan.streamed_share == 1


CLASSES = 5
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.3, 1.7], dtype=torch.double)


class Loss(nn.Module):
    """A small segmentation network that returns its loss."""

    def __init__(self, loss):
        super().__init__()
        self.body = nn.Sequential(conv(2, 4, padding=1), nn.ReLU(), conv(4, CLASSES, padding=1))
        self.loss = loss
        self.register_buffer("weight", WEIGHT)
        self.double()

    def forward(self, x, target):
        return self.loss(self, self.body(x), target)


def classes(batch, *extents):
    return torch.randint(0, CLASSES, (batch, *extents))


def assert_no_map_is_held(model, *inputs):
    """No segment leaves anything of the image's size."""
    compiled = fxstream.compile(model, tile=11, segments=1, verify=False)
    compiled(*inputs)
    metas = fxstream.inspect(compiled).last.analysis.graph.metas
    held = {o: metas[o].shape for plan in compiled.plan.segments for o in plan.segment.outputs}
    assert all(len(shape) <= 2 for shape in held.values()), held


OF_CLASSES = {
    "mean": lambda m, z, t: F.cross_entropy(z, t),
    "sum": lambda m, z, t: F.cross_entropy(z, t, reduction="sum"),
    "weights": lambda m, z, t: F.cross_entropy(z, t, m.weight, ignore_index=2),
    "smoothing": lambda m, z, t: F.cross_entropy(z, t, m.weight, ignore_index=2, label_smoothing=0.1),
    "smoothing alone": lambda m, z, t: F.cross_entropy(z, t, ignore_index=0, label_smoothing=0.2),
    "sum, smoothing": lambda m, z, t: F.cross_entropy(z, t, m.weight, label_smoothing=0.2, reduction="sum"),
    "each, then masked": lambda m, z, t: (
        (F.cross_entropy(z, t, m.weight, reduction="none") * (t != 3)).sum() / (t != 3).sum()
    ),
    "log likelihood": lambda m, z, t: F.nll_loss(z.log_softmax(1), t, m.weight, ignore_index=1),
    "log likelihood, each": lambda m, z, t: F.nll_loss(z.log_softmax(1), t, reduction="none").mean(),
    "nothing counts": lambda m, z, t: F.cross_entropy(z, t * 0, ignore_index=0, reduction="sum"),
    "one class of each": lambda m, z, t: z.softmax(1).gather(1, t.unsqueeze(1)).log().mean(),
    "focal": lambda m, z, t: (lambda each: ((1 - torch.exp(-each)) ** 2 * each).mean())(
        F.cross_entropy(z, t, reduction="none")
    ),
    "dice": lambda m, z, t: dice(z.softmax(1), F.one_hot(t, CLASSES).permute(0, 3, 1, 2).to(z.dtype)),
    "with others": lambda m, z, t: (
        F.cross_entropy(z, t) + dice(z.softmax(1), F.one_hot(t, CLASSES).permute(0, 3, 1, 2).to(z.dtype))
    ),
}


def dice(p, y):
    both, all_of = (p * y).sum((2, 3)), p.sum((2, 3)) + y.sum((2, 3))
    return 1 - ((2 * both + 1) / (all_of + 1)).mean()


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("batch", [1, 3])
def test_losses_of_classes(name, batch):
    model, inputs = Loss(OF_CLASSES[name]), (image(batch, 2, 23, 19), classes(batch, 23, 19))
    plan = assert_streams(model, *inputs, tile=11, verify=batch == 1)
    assert plan.streamed_share > 0.99
    assert_no_map_is_held(model, *inputs)


OF_ELEMENTS = {
    "mse": lambda m, z, t: F.mse_loss(z, t),
    "l1": lambda m, z, t: F.l1_loss(z, t, reduction="sum"),
    "smooth l1": lambda m, z, t: F.smooth_l1_loss(z, t, beta=0.5),
    "huber": lambda m, z, t: F.huber_loss(z, t, delta=0.7),
    "bce": lambda m, z, t: F.binary_cross_entropy(z.sigmoid(), t.sigmoid(), weight=m.weight.view(-1, 1, 1)),
    "bce with logits": lambda m, z, t: F.binary_cross_entropy_with_logits(
        z, t.sigmoid(), t.abs(), pos_weight=m.weight.view(-1, 1, 1)
    ),
    "kl": lambda m, z, t: F.kl_div(z.log_softmax(1), t.softmax(1), reduction="batchmean"),
    "kl of logarithms": lambda m, z, t: F.kl_div(z.log_softmax(1), t.log_softmax(1), log_target=True),
    "soft margin": lambda m, z, t: F.soft_margin_loss(z, t.sign()),
    "poisson": lambda m, z, t: F.poisson_nll_loss(z, t.abs(), full=True),
    "hinge": lambda m, z, t: F.hinge_embedding_loss(z, t.sign()),
    "probabilities": lambda m, z, t: F.cross_entropy(z, t.softmax(1), m.weight, label_smoothing=0.1),
    "broadcast": lambda m, z, t: F.mse_loss(z, t[:, :1].expand_as(z), reduction="sum"),
    "each": lambda m, z, t: F.smooth_l1_loss(z, t, reduction="none").amax(),
}


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("name", OF_ELEMENTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_losses_of_elements(name, batch):
    model, inputs = Loss(OF_ELEMENTS[name]), (image(batch, 2, 23, 19), image(batch, CLASSES, 23, 19).detach())
    plan = assert_streams(model, *inputs, tile=11, verify=batch == 1)
    assert plan.streamed_share > 0.99
    assert_no_map_is_held(model, *inputs)


def test_the_planner_holds_no_logits():
    model, inputs = Loss(OF_CLASSES["weights"]), (image(2, 2, 40, 40), classes(2, 40, 40))
    compiled = fxstream.compile(model, tile=17)
    compiled(*inputs)
    metas = fxstream.inspect(compiled).last.analysis.graph.metas
    held = [metas[o].shape for plan in compiled.plan.segments for o in plan.segment.outputs]
    assert (2, CLASSES, 40, 40) not in held


def test_every_pixel_ignored_is_nan_as_in_torch():
    model = Loss(OF_CLASSES["mean"])
    x, target = image(1, 2, 20, 20), torch.full((1, 20, 20), -100)
    assert fxstream.compile(model, tile=9)(x, target).isnan()
    assert model(x, target).isnan()


def test_one_capture_of_a_loss_serves_every_size():
    model = Loss(OF_CLASSES["weights"])
    compiled = fxstream.compile(model, tile=9)
    for batch, height, width in ((1, 20, 20), (2, 31, 17)):
        x, target = image(batch, 2, height, width), classes(batch, height, width)
        assert torch.allclose(compiled(x, target), model(x, target), atol=1e-12)
    assert captures(compiled) == 1


class Segmentation(nn.Module):
    """A strided body with BatchNorm and bilinear upsampling of its logits; returns its loss."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        )
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x, target):
        logits = F.interpolate(self.head(self.body(x).relu()), scale_factor=4.0, mode="bilinear")
        return F.cross_entropy(logits, target, ignore_index=255)


def test_a_step_takes_less_than_the_logits_alone():
    model, extent = Segmentation(24).double(), 192
    plain, x = copy.deepcopy(model), torch.randn(1, 3, extent, extent).double()
    target = torch.randint(0, 24, (1, extent, extent))
    target[:, :9] = 255
    logits = 24 * extent * extent * 8
    module = fxstream.compile(model, memory=logits // 3)
    found = step(module, model, [x, target])
    assert_same(found, step(plain, plain, [x, target]), 1e-10)
    assert all(report.agrees for report in module.probe)

    def training_step():
        model.zero_grad()
        module(x, target).backward()

    assert measure(training_step).peak_bytes < 1.15 * logits // 3
