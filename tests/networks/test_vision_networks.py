"""Networks of windows, attention, volumes and video in float64: outputs, gradients and buffers to 1e-10 of plain.

A campaign (`-m campaign`): odd sizes, one image and two, several tiles and budgets, a compiled module per request.
It needs the packages of `fxstream[zoo]`; networks whose package is not installed are skipped.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, randomise_statistics, step
from torch import nn

import fxstream

pytestmark = [pytest.mark.campaign, pytest.mark.filterwarnings("ignore")]
EXAMPLES = Path(__file__).parents[2] / "examples"


class CoordinateAttention(nn.Module):
    """What a row and what a column has on average, mixed over both, as gates of every pixel."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.of_rows, self.of_columns = nn.Conv2d(8, width, 1), nn.Conv2d(8, width, 1)

    def forward(self, x):
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        rows, columns = self.mix(torch.cat([rows, columns], 2)).split([x.shape[2], x.shape[3]], 2)
        return x * self.of_rows(rows).sigmoid() * self.of_columns(columns.transpose(2, 3)).sigmoid()


class Inverted(nn.Module):
    """An inverted residual of a MobileNet with coordinate attention."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, 3 * width, 1, bias=False),
            nn.BatchNorm2d(3 * width),
            nn.Hardswish(),
            nn.Conv2d(3 * width, 3 * width, 3, stride, 1, groups=3 * width, bias=False),
            nn.BatchNorm2d(3 * width),
            CoordinateAttention(3 * width),
            nn.Conv2d(3 * width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.adds = stride == 1 and width == out

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


def coordinate_mobilenet():
    blocks = [Inverted(*sizes) for sizes in ((8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1))]
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class PatchEncoder(nn.Module):
    """Patches (kernel = stride = field), a block of attention over all, and a gated attention pooling."""

    def __init__(self, width=24):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.value, self.gate, self.score = nn.Linear(width, 16), nn.Linear(width, 16), nn.Linear(16, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](tokens)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.proj(attended)
        tokens = tokens + self.mlp(self.norms[1](tokens))
        weights = self.score(self.value(tokens).tanh() * self.gate(tokens).sigmoid()).softmax(1)
        return self.head((weights * tokens).sum(1))


class ChannelAttention(nn.Module):
    """Attention of channels to channels, with queries and keys of length 1 over all positions."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.near = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width, bias=False)
        self.proj = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = (t.view(b, self.heads, -1, h * w) for t in self.near(self.qkv(x)).chunk(3, 1))
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale
        return self.proj((weights.softmax(-1) @ v).reshape(b, c, h, w))


class GatedMlp(nn.Module):
    """Two halves of depthwise features, one the gate of the other."""

    def __init__(self, width):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.near = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)

    def forward(self, x):
        gate, value = self.near(self.enter(x)).chunk(2, 1)
        return self.leave(F.gelu(gate) * value)


class RestormerBlock(nn.Module):
    """Channel attention and a gated MLP, each behind a LayerNorm over the channels of a pixel."""

    def __init__(self, width, heads):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention, self.mlp = ChannelAttention(width, heads), GatedMlp(width)

    def forward(self, x):
        for norm, part in zip(self.norms, (self.attention, self.mlp), strict=True):
            b, c, h, w = x.shape
            tokens = norm(x.flatten(2).transpose(1, 2))
            x = x + part(tokens.transpose(1, 2).reshape(b, c, h, w))
        return x


class Restormer(nn.Module):
    """The network of Zamir et al. (CVPR 2022), of two levels and narrow."""

    def __init__(self, width=8):
        super().__init__()
        self.embed, self.output = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(2 * width, 3, 3, padding=1)
        self.encoder = nn.Sequential(RestormerBlock(width, 1), RestormerBlock(width, 1))
        self.down = nn.Sequential(nn.Conv2d(width, width // 2, 3, padding=1), nn.PixelUnshuffle(2))
        self.latent = nn.Sequential(RestormerBlock(2 * width, 2), RestormerBlock(2 * width, 2))
        self.up = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.decoder = RestormerBlock(2 * width, 1)

    def forward(self, image):
        fine = self.encoder(self.embed(image))
        coarse = self.up(self.latent(self.down(fine)))
        return image + self.output(self.decoder(torch.cat([coarse, fine], 1)))


def style_network():
    """Circular padding and instance normalisation, down and up again."""

    def layer(i, o, k, s=1):
        convolution = nn.Conv2d(i, o, k, s, k // 2, padding_mode="circular")
        return [convolution, nn.InstanceNorm2d(o, affine=True), nn.ReLU()]

    up = [nn.Upsample(scale_factor=2), *layer(16, 8, 3)]
    ends = [nn.Conv2d(8, 3, 9, padding=4, padding_mode="circular"), nn.Tanh()]
    return nn.Sequential(*layer(3, 8, 9), *layer(8, 16, 3, 2), *layer(16, 16, 3), *up, *ends)


def timm(name, **options):
    def make():
        return pytest.importorskip("timm").create_model(name, num_classes=5, **options)

    return make


def torchvision(name, **options):
    def make():
        return getattr(pytest.importorskip("torchvision").models, name)(num_classes=5, **options)

    return make


def packaged(name):
    """A network of the list that `examples/networks.py --packages` asks."""

    def make():
        if str(EXAMPLES) not in sys.path:
            sys.path.append(str(EXAMPLES))
        from package_network import build
        from package_networks import NETWORKS

        network = next(network for network in NETWORKS if network.name == name)
        pytest.importorskip(network.imported)
        return build(network)

    return make


def rgb(*sizes):
    return [(batch, 3, *size) for size, batch in zip(sizes, (1, 2), strict=True)]


ODD = rgb((75, 91), (99, 67))
LARGER = rgb((145, 203), (231, 179))
LARGEST = rgb((259, 291), (275, 257))
BY_8 = rgb((72, 104), (88, 56))
CASES = {  # what makes it, shapes of its images, tiles
    "Swin-T": (torchvision("swin_t"), LARGEST, (200, 240)),
    "SwinV2-T": (torchvision("swin_v2_t"), LARGEST, (200, 240)),
    "SwinIR": (packaged("spandrel/SwinIR"), ODD, (32, 47)),
    "HAT": (packaged("spandrel/HAT"), ODD, (48, 70)),
    "SwinUNETR 2-D": (packaged("monai/SwinUNETR 2-D"), [(1, 1, 96, 160), (2, 1, 160, 96)], (64, 80)),
    "SwinUNETR 3-D": (packaged("monai/SwinUNETR 3-D"), [(1, 1, 64, 64, 32), (2, 1, 32, 64, 64)], (48, 56)),
    "SegFormer-B0": (packaged("smp/Segformer mit_b0"), [(1, 3, 160, 224), (2, 3, 224, 96)], (64, 96)),
    "MaxViT": (
        timm("maxvit_rmlp_pico_rw_256", img_size=(160, 224)),
        [(1, 3, 160, 224), (2, 3, 160, 224)],
        (64, 96),
    ),
    "PVTv2": (packaged("transformers/PvtV2Model"), ODD, (32, 48)),
    "Restormer": (Restormer, BY_8, (40, 56)),
    "NAFNet": (packaged("spandrel/NAFNet"), ODD, (32, 47)),
    "ViT-S": (
        timm("vit_small_patch16_224", dynamic_img_size=True, depth=2),
        rgb((320, 448), (304, 336)),
        (64, 96),
    ),
    "coordinate MobileNet": (coordinate_mobilenet, ODD, (32, 47)),
    "CBAM": (timm("resnet26d", block_args={"attn_layer": "cbam"}), LARGER, (96, 131)),
    "DeepLabV3+": (packaged("smp/DeepLabV3Plus tu-test_resnet"), [(2, 3, 160, 208), (3, 3, 208, 144)], (64, 112)),
    "U-Net++": (packaged("smp/UnetPlusPlus tu-test_resnet"), [(1, 3, 160, 224), (2, 3, 224, 96)], (96, 130)),
    "nnU-Net 3-D": (
        packaged("dynamic_network_architectures/PlainConvUNet 3-D"),
        [(1, 1, 40, 56, 24), (2, 1, 24, 40, 40)],
        (24, 32),
    ),
    "AutoencoderKL": (packaged("diffusers/AutoencoderKL"), rgb((70, 94), (98, 66)), (40, 57)),
    "Wan decoder": (packaged("diffusers/AutoencoderKLWan"), [(1, 4, 3, 9, 13), (2, 4, 3, 11, 7)], (6, 8)),
    "LTX decoder": (packaged("diffusers/AutoencoderKLLTXVideo"), [(1, 8, 3, 9, 11), (2, 8, 2, 11, 9)], (6, 8)),
    "patch encoder": (PatchEncoder, BY_8, (32, 48)),
    "style network": (style_network, BY_8, (32, 47)),
}
BUDGETS = (0.7, 0.4)
IN_FLOAT32 = ("Wan decoder", "LTX decoder")
"""Networks whose own code computes a part in float32, whatever their type."""


def in_float64(make) -> nn.Module:
    """The network in training mode, where it draws nothing."""
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ in ("DropPath", "StochasticDepth"):
            module.eval()
            for name in ("p", "drop_prob"):
                if hasattr(module, name):
                    setattr(module, name, 0.0)
    return randomise_statistics(model).double().train()


def assert_exact(name, model, **request) -> None:
    """One compiled module at every shape, within the least that works where that is more; some of it is tiled."""
    tolerance, shapes = 1e-5 if name in IN_FLOAT32 else 1e-10, CASES[name][1]
    plain, streamed = copy.deepcopy(model), copy.deepcopy(model)
    module = fxstream.compile(streamed, **request)
    tiled = False
    for shape in shapes:
        image = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected, before = step(plain, plain, [image]), copy.deepcopy(streamed.state_dict())
        while True:
            try:
                results = step(module, streamed, [image])
                break
            except fxstream.PlanError as error:
                streamed.load_state_dict(before)
                least = {"memory": int(1.05 * (error.least_bytes or 0))} if "memory" in request else {}
                request |= least or {"tile": max(request["tile"] + 1, error.least_tile)}
                module = fxstream.compile(streamed, **request)
        assert_same(results, expected, tolerance)
        plans = [call.pipeline.shared.last.plan for call in fxstream.inspect(module).calls]
        tiled = tiled or not all(plan.is_trivial for plan in plans)
    assert tiled


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_campaign_of_tiles(name, place):
    make, _, tiles = CASES[name]
    assert_exact(name, in_float64(make), tile=tiles[place])


@pytest.mark.parametrize("share", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_campaign_within_a_memory(name, share):
    make, shapes, _ = CASES[name]
    model = in_float64(make)
    whole = fxstream.compile(copy.deepcopy(model), memory=2**40, verify=False)
    whole(torch.randn(shapes[0], dtype=torch.float64, requires_grad=True))
    assert_exact(name, model, memory=int(share * whole.plan.prediction.plain_bytes))
