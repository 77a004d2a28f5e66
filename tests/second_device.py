"""Steps on a second device (`elsewhere`), in a process of their own: it is defined before autograd runs.

Started by `planning/test_offload.py`.
"""

import operator

import pytest
import torch
from compare import integer_image
from elsewhere import Elsewhere, elsewhere
from offloading import network, planned

from fxstream.graph.autograd_saves import saves_of
from fxstream.runtime.rewrite import StreamedSegment, rewrite
from fxstream.tiling.request import Request
from fxstream.tiling.reuse import reuse_memory


@pytest.fixture(autouse=True)
def place():
    """The device; not made known on import, for pytest imports every file to look for doctests."""
    return elsewhere()


def there(tensor):
    return Elsewhere(tensor.detach().clone()).requires_grad_(tensor.requires_grad)


def run_there(model, request, image, on_host):
    """Output, gradients of the image and the weights, and what each segment yielded, of a step elsewhere."""
    analysis, plan = planned(model, request, *image.shape[2:])
    graph = reuse_memory(analysis.graph.with_saves(saves_of(analysis.graph)))
    streamed = rewrite(analysis.captured, graph, plan)
    yielded = {}
    for name, module in streamed.named_modules():
        if isinstance(module, StreamedSegment):
            module.register_forward_hook(lambda m, i, o, name=name: yielded.update({name: o}))
    weights = [there(operator.attrgetter(path)(model)) for path in analysis.captured.tensors]
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


def test_the_second_device_refuses_what_a_device_refuses(place):
    a, b = Elsewhere(torch.ones(2)), torch.ones(2)
    assert a.device == place
    with pytest.raises(RuntimeError, match="same device"):
        a + b
    assert torch.equal((a + b.to(a.device)).cpu(), 2 * b)
