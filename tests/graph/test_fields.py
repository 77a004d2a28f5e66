"""Receptive fields: closed forms against integer propagation, both against the real operators, and literature."""

import pytest
import torch
from compare import integer_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import CHANNELS, RandomGraph, local_graphs
from torch import nn

import fxstream
from fxstream.errors import CaptureError
from fxstream.geometry.box import Interval
from fxstream.graph.fields import demands, extent_chains, main_image, receptive_fields
from fxstream.report.closed_form import IMAGE, extent_form
from fxstream.rules import Tileability
from fxstream.tiling.axes.bounds import BoundsPass
from fxstream.tiling.segment import make_segment
from fxstream.tools import zoo


def region_of(model, size, channels, batch=2):
    analysis = fxstream.analyze(model, size, channels=channels, batch=batch)
    return analysis.graph, analysis.regions


@given(local_graphs, st.tuples(st.integers(90, 110), st.integers(90, 110)))
@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
def test_fields_demands_and_extents_agree_with_the_integers_and_the_operators(graph, size):
    torch.manual_seed(0)
    model = RandomGraph(graph)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    image = integer_image(2, CHANNELS, *size).detach().abs().add(1).requires_grad_()
    try:
        outputs = model(image)
        typed, regions = region_of(model, size, CHANNELS)
    except (RuntimeError, ValueError, CaptureError):
        return
    output = outputs if isinstance(outputs, torch.Tensor) else outputs[-1]
    source = main_image(typed)
    for region in regions:
        fields = receptive_fields(typed, region.nodes, source)
        chains = extent_chains(typed, region.nodes, source)
        for name, per_axis in chains.items():
            if name in region.nodes and name in fields:
                for k, chain in enumerate(per_axis):
                    assert extent_form(chain).subs(IMAGE, size[k]) == typed.value(name).extents[k]
        segment = make_segment(typed, "region", region.nodes)
        for axis in range(2):
            walk = BoundsPass(segment, axis)
            for place, name in enumerate(segment.outputs):
                if name not in fields:  # branches of different strides
                    continue
                extent = typed.value(name).extents[axis]
                owned = Interval(extent // 2, extent // 2 + 1)
                wanted = fields[name][axis].read(owned)
                boxes = walk.boxes([owned if i == place else Interval(0, 0) for i in range(len(segment.outputs))])
                needed = {n: f[axis].read(owned) for n, f in demands(typed, region.nodes, name).items()}
                inside = all(
                    box.start >= 0 and box.stop <= typed.value(n).extents[axis] for n, box in needed.items()
                )
                if inside:
                    assert boxes == needed
                    assert needed[source] == wanted
                    support = gradient_support(typed, model, image, name, axis, owned.start)
                    if support is not None:
                        assert wanted.hull(support) == wanted
                        if not any(step[0] in ("max_pool", "relu", "transposed") for step in graph):
                            assert support == wanted
    assert output is not None


def gradient_support(typed, model, image, name, axis, pixel):
    """The pixels of the image that one line of the model's last output depends on."""
    outputs = model(image)
    last = outputs if isinstance(outputs, torch.Tensor) else outputs[-1]
    result = next(node for node in typed.graph.nodes if node.op == "output").args[0][-1]
    if result.name != name:
        return None
    (gradient,) = torch.autograd.grad(last.narrow(2 + axis, pixel, 1).sum(), image)
    reached = gradient.abs().sum([d for d in range(4) if d != 2 + axis]).nonzero().flatten().tolist()
    return Interval(reached[0], reached[-1] + 1) if reached else Interval(0, 0)


def stem_end(model, size=512):
    """The field of the last node of the first region, in pixels of the image."""
    typed, regions = region_of(fxstream.freeze_batch_norm(model).eval(), size, 3)
    nodes = regions[0].nodes
    fields = receptive_fields(typed, nodes, main_image(typed))
    return fields[nodes[-1]][0]


def original_strides(model):
    """Strides on the 1x1 convolution of a bottleneck, as published; torchvision has them on the 3x3."""
    for block in model.modules():
        if isinstance(block, zoo_bottleneck()):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return model


def zoo_bottleneck():
    zoo.define_missing_torchvision_schemas()
    from torchvision.models.resnet import Bottleneck

    return Bottleneck


# Araujo, Norris, Sim, "Computing receptive fields of convolutional neural networks", Distill 2019, table 1
PUBLISHED = {
    "alexnet": ("torchvision/alexnet", 195, 32),
    "vgg16": ("torchvision/vgg16", 212, 32),
    "mobilenet v1": ("timm/mobilenetv1_100", 315, 32),
    "inception v3": ("torchvision/inception_v3", 1311, 32),
    "resnet50": ("torchvision/resnet50", 483, 32),
    "resnet101": ("torchvision/resnet101", 1027, 32),
    "resnet152": ("torchvision/resnet152", 1507, 32),
}
MEASURED = {  # gradient support of the real operators; torchvision's ResNets have their strides on the 3x3
    "resnet18": (435, 217, 217),
    "resnet34": (899, 449, 449),
    "resnet50": (427, 213, 213),
    "resnet101": (971, 485, 485),
    "resnet152": (1451, 725, 725),
    "densenet121": (2071, 1021, 1049),
    "densenet161": (2967, 1469, 1497),
    "densenet169": (3351, 1661, 1689),
    "densenet201": (3863, 1917, 1945),
    "convnext_tiny": (1688, 828, 859),
    "mobilenet_v2": (491, 245, 245),
    "googlenet": (379, 167, 211),
    "regnet_x_400mf": (975, 487, 487),
    "mnasnet1_0": (843, 421, 421),
    "shufflenet_v2_x1_0": (527, 263, 263),
    "squeezenet1_1": (207, 88, 118),
}


IN_SUITE = {
    "alexnet",
    "vgg16",
    "resnet50",
    "mobilenet v1",
    "resnet18",
    "convnext_tiny",
    "squeezenet1_1",
}


def in_suite(names):
    return [name if name in IN_SUITE else pytest.param(name, marks=pytest.mark.campaign) for name in names]


@pytest.mark.parametrize("name", in_suite(PUBLISHED))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_published_receptive_fields(name):
    target, size, stride = PUBLISHED[name]
    model = zoo.build(target)
    field = stem_end(original_strides(model) if name.startswith("resnet") else model)
    assert (field.size, field.stride) == (size, stride)


@pytest.mark.parametrize("name", in_suite(MEASURED))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_measured_receptive_fields(name):
    field = stem_end(zoo.build(f"torchvision/{name}"))
    assert (field.size, field.padding, field.high(0)) == MEASURED[name]
    assert field.padding + field.high(0) + 1 == field.size
    assert field.overlap == field.size - field.stride


def test_what_follows_a_global_operator_depends_on_everything():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))

    typed, regions = region_of(Gated(), 32, 3)
    every = [name for name, verdict in typed.verdicts.items() if verdict.kind is Tileability.LOCAL]
    fields = receptive_fields(typed, list(typed.verdicts), main_image(typed))
    assert set(fields) & set(every) == {regions[0].nodes[0]}
