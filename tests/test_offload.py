"""Boundaries in host memory: planned for a device, and run on a second device that is made of Python."""

import pytest
import torch
from compare import integer_image, make_integer
from elsewhere import Elsewhere, elsewhere
from torch import nn

import fxstream
from fxstream.analysis import analyze
from fxstream.planning import make_plan
from fxstream.request import Request
from fxstream.rewrite import StreamedSegment, rewrite
from fxstream.saved import saved_by
from fxstream.zoo import build


def network():
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 4, 3, padding=1)]
    return make_integer(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1)))


def there(tensor):
    return Elsewhere(tensor.detach().clone()).requires_grad_(tensor.requires_grad)


def planned(model, request, *size):
    analysis = analyze(model, size, channels=2, batch=2)
    return analysis, make_plan(analysis.locality, request, device=elsewhere())


def run_there(model, request, image, on_host):
    """Output, gradients of the image and the weights, and what each segment yielded, of a step elsewhere."""
    analysis, plan = planned(model, request, *image.shape[2:])
    streamed = rewrite(analysis.captured, analysis.locality, plan, saved_by(analysis.locality))
    yielded = {}
    for name, module in streamed.named_modules():
        if isinstance(module, StreamedSegment):
            module.register_forward_hook(lambda m, i, o, name=name: yielded.update({name: o}))
    weights = [there(tensor) for tensor in analysis.captured.model_tensors(model)]
    image = image.detach().clone().requires_grad_() if on_host else there(image)
    (output,) = streamed(*weights, image)
    assert isinstance(output, Elsewhere)
    for value in yielded.values():
        value.retain_grad()
    (output * 3).sum().backward()
    return plan, output, image.grad, [w.grad.inner for w in weights if w.grad is not None], yielded


def run_here(model, image):
    model.zero_grad()
    image = image.detach().clone().requires_grad_()
    output = model(image)
    (output * 3).sum().backward()
    return output, image.grad, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_on_a_second_device_the_same(on_host, offload):
    torch.manual_seed(0)
    model, image = network(), integer_image(2, 2, 32, 64)
    request = Request(20, segments=("2", "4"), offload=offload)
    plan, output, of_image, of_weights, yielded = run_there(model, request, image, on_host)
    wanted = run_here(model, image)
    assert torch.equal(output.inner, wanted[0])
    assert torch.equal(of_image if on_host else of_image.inner, wanted[1])
    assert isinstance(of_image, Elsewhere) != on_host
    assert all(torch.equal(a, b) for a, b in zip(of_weights, wanted[2], strict=True))
    assert len(plan.offloaded) == 2 * offload
    boundaries = [value for value in yielded.values() if value.ndim == 4 and value.shape[-1] > 1]
    assert len(boundaries) >= 2
    for value in boundaries:
        assert isinstance(value, Elsewhere) != offload
        assert isinstance(value.grad, Elsewhere) != offload


def test_the_second_device_refuses_what_a_device_refuses():
    a, b = Elsewhere(torch.ones(2)), torch.ones(2)
    assert a.device == elsewhere()
    with pytest.raises(RuntimeError, match="same device"):
        a + b
    assert torch.equal((a + b.to(a.device)).cpu(), 2 * b)


def test_a_boundary_that_something_else_reads_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x):
            y = self.first(x)
            return self.second(y), y.flatten(2).sort().values

    _, plan = planned(Twice(), Request(20, segments=("first",), offload=True), 40, 44)
    assert len(plan.segments) > 1
    assert plan.offloaded == frozenset()


def test_where_no_weights_say_where_to_compute_a_boundary_stays():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3), nn.MaxPool2d(2))
    _, plan = planned(model, Request(20, segments=("1",), offload=True), 40, 44)
    assert len(plan.segments) == 2
    assert plan.offloaded == frozenset()


def test_less_memory_is_needed_where_boundaries_are_elsewhere():
    model = fxstream.freeze_batch_norm(build("torchvision/resnet18")).train()
    least = []
    for offload in (False, True):
        with pytest.raises(fxstream.PlanError) as error:
            fxstream.plan(model, 4096, memory=1, offload=offload, device="cuda", segments=4)
        least.append(error.value.least_bytes)
    assert least[1] < least[0]
    plan = fxstream.plan(model, 4096, memory=least[1], offload=True, device="cuda", segments=4)
    assert plan.prediction.bytes <= least[1]
    assert plan.prediction.offloaded == analyze(model, 4096).locality.activation_bytes(plan.offloaded)
    assert "in host memory: boundaries" in str(plan)


def test_on_a_cpu_nothing_changes():
    model, image = network(), integer_image(1, 2, 32, 64)
    module = fxstream.compile(model, tile=20, segments=2, offload=True)
    assert torch.equal(module(image), model(image))
    assert module.plan.offloaded == frozenset()


def test_not_with_ranks_that_share_tiles():
    with pytest.raises(fxstream.InputError, match="exclude each other"):
        fxstream.compile(network(), tile=20, offload=True, mesh=object())
