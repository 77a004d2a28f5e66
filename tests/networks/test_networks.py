"""Real networks in float64: output and every gradient within 1e-10 of the plain network.

The suite takes one or both ways through each network; the campaign (`-m campaign`) the whole matrix.
"""

import subprocess
import sys

import pytest
import torch
import torchvision
from compare import assert_same, assert_streams, randomise_statistics, step

import fxstream
from fxstream.tools import zoo

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "vgg11",
    "vgg16_bn",
    "convnext_tiny",
    "mobilenet_v2",
]
TIMM = ["resnet26d", "regnetx_002", "repvgg_a0", "convnext_atto", "dpn68"]
NETWORKS = [*TORCHVISION, *(f"timm/{name}" for name in TIMM)]
ONE_SEGMENT = {  # (tile along the long axis of a thin image, where the stream ends)
    "resnet18": (460, None),
    "resnet50": (460, None),
    "densenet121": (300, "features.denseblock2"),
    "vgg16_bn": (220, None),
    "mobilenet_v2": (500, None),
    "convnext_tiny": (300, "features.3"),
    "timm/resnet26d": (460, None),
}
WHOLE_WIDTH = {  # a little more than the receptive field of the whole network, so that there are several tiles
    "resnet18": 539,
    "resnet34": 1001,
    "resnet50": 531,
    "resnet101": 1201,
    "wide_resnet50_2": 531,
    "resnext50_32x4d": 531,
    "densenet121": 2301,
    "densenet161": 3201,
    "densenet169": 3601,
    "densenet201": 4101,
    "vgg11": 301,
    "vgg16_bn": 331,
    "convnext_tiny": 1901,
    "mobilenet_v2": 601,
    "timm/resnet26d": 601,
    "timm/regnetx_002": 1001,
    "timm/repvgg_a0": 901,
    "timm/convnext_atto": 1901,
    "timm/dpn68": 1301,
}
SMALL = ((97, 135), 96)
WIDE_KERNELS = ((65, 270), (65, 232))


def build(name: str) -> torch.nn.Module:
    options = {"num_classes": 7}
    model = zoo.build(name if "/" in name else f"torchvision/{name}", **options)
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    return fxstream.freeze_batch_norm(randomise_statistics(model)).double().train()


def image(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.double, requires_grad=True)


SIBLINGS = (
    "resnet101",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "densenet161",
    "densenet169",
    "densenet201",
    "vgg11",
    "vgg16_bn",
)
"""Large networks of the same make as others, which the campaign has."""
LARGEST = {"densenet121", "vgg16_bn"}
"""Those that the campaign has in one segment."""


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in SIBLINGS])
def test_several_segments(name):
    size, tile = WIDE_KERNELS if "convnext" in name else SMALL
    plan = assert_streams(build(name), image(3, *size), tile=tile, verify=False)
    assert len(plan.segments) > 1
    assert plan.streamed_share > 0.9


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.campaign] * (name in LARGEST)) for name in ONE_SEGMENT]
)
def test_one_segment(name):
    tile, cut = ONE_SEGMENT[name]
    assert_streams(build(name), image(1, 37, tile + 131), tile=(37, tile), segments=1, cut=cut, verify=False)


IN_SUITE = [("resnet18", 0.25), ("densenet121", 0.25), ("mobilenet_v2", 0.55), ("timm/dpn68", 0.55)]


@pytest.mark.parametrize(("name", "share"), IN_SUITE)
def test_within_a_memory(name, share):
    compare_within(name, share)


@pytest.mark.campaign
@pytest.mark.parametrize("share", [0.25, 0.55])
@pytest.mark.parametrize("name", NETWORKS)
def test_campaign_within_a_memory(name, share):
    compare_within(name, share)


def compare_within(name, share):
    model, picture = build(name), image(1, 161, 150)
    plain = step(model, model, [picture])
    module = fxstream.compile(model, memory=0.999, verify=False)
    module(picture)
    peak = module.plan.prediction.plain_bytes
    weights = sum(p.numel() for p in model.parameters()) * 8
    streamed = fxstream.compile(model, memory=int(weights + share * (peak - weights)), verify=False)
    assert_same(step(streamed, model, [picture]), plain, 1e-10)
    assert not streamed.plan.is_trivial


@pytest.mark.campaign
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_campaign_of_whole_networks_in_one_segment(name, batch):
    width = WHOLE_WIDTH[name]
    assert_streams(build(name), image(batch, 33, width), tile=(33, width - 20), segments=1, verify=False)


@pytest.mark.campaign
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(97, 135), (128, 160), (131, 101), (161, 300)])
@pytest.mark.parametrize("name", NETWORKS)
def test_campaign_of_networks(name, size, batch):
    tile = tuple(extent * 6 // 7 for extent in size) if "convnext" in name else 96
    assert_streams(build(name), image(batch, *size), tile=tile, verify=False)


COMPILED = """
import torch
from fxstream.tools.zoo import define_missing_torchvision_schemas
library, loaded = torch.library.Library("torchvision", "FRAGMENT"), []
def load(path):
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    loaded.append(path)
torch.ops.load_library = load
define_missing_torchvision_schemas()
print(len(loaded), torch.ops.torchvision.nms.default._schema.name)
"""


def test_compiled_operators_are_not_defined_again():
    """On a machine without a GPU too: whoever defines an operator twice, python ends there."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True)
    assert done.stdout == "1 torchvision::nms\n"
