"""Small networks that predecessors get wrong, bit-equal on the integer oracle with tiny tiles."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams, integer_image, make_integer, streams
from small_networks import CASES, Function, channels_last, conv, squeeze_excite
from torch import nn

import fxstream
from fxstream.tools.check import relative_error, step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [13, 16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.filterwarnings("ignore:.*(is bound to the size|not probed):fxstream.StreamingWarning")
def test_bit_equal_to_the_plain_network(name, tile, batch):
    model = make_integer(CASES[name]).eval()
    channels = next(p for p in model.parameters() if p.ndim == 4).shape
    transposed = isinstance(model, nn.Sequential) and isinstance(model[0], nn.ConvTranspose2d)
    groups = getattr(model[0], "groups", 1) if isinstance(model, nn.Sequential) else 1
    if name == "positional parameter":
        channels = model.a.weight.shape
    image = integer_image(batch, channels[0] if transposed else channels[1] * groups, 21, 17)
    assert_streams(model, image, tile=tile, segments=1, tolerance=0.0, verify=(tile, batch) == (13, 1))


def test_channels_last_network():
    norm, mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    parts = {
        "patch": conv(3, 4, 2, stride=2),
        "norm": norm,
        "mlp": mlp,
        "depthwise": conv(4, 4, 5, padding=2, groups=4),
    }
    model = Function(channels_last, **parts).double()
    image = torch.randn(2, 3, 37, 34, dtype=torch.double, requires_grad=True)
    assert_streams(model, image, tile=20)


def test_regions_start_again_behind_a_gate():
    parts = {"a": conv(2, 4, padding=1), "b": conv(4, 4), "c": conv(4, 4), "gate": conv(4, 4, 1)}
    model = make_integer(Function(squeeze_excite, **parts))
    plan = assert_streams(model, integer_image(2, 2, 19, 23), tile=12, tolerance=1e-12)
    assert len(plan.segments) >= 2


MODES = [(mode, aligned) for mode in ("bilinear", "bicubic") for aligned in (False, True)]
SIZES = [{"scale_factor": s} for s in (2, 3, 1.5, (0.5, 1), (0.25, 0.3), (1.31, 0.77))]
SIZES += [
    {"scale_factor": s} for s in ((1.02, 1.03), (1.02, 2.02), (2, 1.01))
]  # torch copies, or halves the index
SIZES += [{"size": s} for s in ((31, 29), (5, 46), (21, 17), (22, 18))]


@pytest.mark.parametrize("mode, aligned", [*MODES, ("nearest", None), ("nearest-exact", None)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_interpolation_by_any_factor(mode, aligned, sizes):
    model = Function(
        lambda m, x: m.b(F.interpolate(m.a(x), mode=mode, align_corners=aligned, **sizes)),
        a=conv(2, 3, padding=1),
        b=conv(3, 2, 2),
    )
    image = torch.randn(2, 2, 21, 17, dtype=torch.double, requires_grad=True)
    probed = sizes in ({"scale_factor": 1.5}, {"scale_factor": (0.25, 0.3)}, {"size": (31, 29)})
    plan = assert_streams(model.double(), image, tile=17, segments=1, at_least_tiles=1, verify=probed)
    kernels_disagree = mode in ("nearest", "bicubic") and sizes.get("scale_factor") in (
        (1.02, 1.03),
        (1.02, 2.02),
        (2, 1.01),
    )
    assert [len(s.segment.nodes) for s in plan.segments] in ([3], []) or kernels_disagree, plan


@pytest.mark.parametrize("shape", [(41,), (21, 17)])
def test_local_response_norm(shape):
    kind = (nn.Conv1d, nn.Conv2d)[len(shape) - 1]
    model = nn.Sequential(kind(2, 5, 3), nn.LocalResponseNorm(3, 0.5), kind(5, 2, 2)).double()
    image = torch.randn(2, 2, *shape, dtype=torch.double, requires_grad=True)
    assert len(assert_streams(model, image, tile=11, segments=1).segments) == 1


def coordinates(x, height, width):
    rows = torch.linspace(-1, 1, height, dtype=x.dtype).view(1, 1, -1, 1).expand(x.shape[0], 1, height, width)
    columns = torch.arange(width, dtype=x.dtype).expand(x.shape[0], 1, height, width)
    grid = torch.meshgrid(torch.arange(height).to(x), torch.arange(width).to(x), indexing="ij")
    return torch.cat([x, rows, columns, torch.stack(grid).expand(x.shape[0], 2, height, width)], 1)


POSITIONS = {
    "coordinate channels": Function(
        lambda m, x: m.b(coordinates(F.relu(m.a(x)), x.shape[2] - 2, x.shape[3] - 2)), a=conv(2, 3), b=conv(7, 2)
    ),
    "coordinates of the image": Function(
        lambda m, x: m.b(F.relu(m.a(coordinates(x, *x.shape[2:])))), a=conv(6, 3), b=conv(3, 2)
    ),
    "learned, added": Function(
        lambda m, x: m.b(m.a(x) + m.at), a=conv(2, 3), b=conv(3, 2), at=nn.Parameter(torch.randn(1, 3, 19, 15))
    ),
    "learned, joined": Function(
        lambda m, x: m.b(torch.cat([m.a(x), m.at.expand(len(x), -1, -1, -1)], 1)),
        a=conv(2, 3),
        b=conv(5, 2),
        at=nn.Parameter(torch.randn(1, 2, 19, 15)),
    ),
    "learned, resized": Function(
        lambda m, x: m.b(m.a(x) + F.interpolate(m.at, size=(19, 15), mode="bicubic")),
        a=conv(2, 3),
        b=conv(3, 2),
        at=nn.Parameter(torch.randn(1, 3, 7, 7)),
    ),
    "learned rows and columns": Function(
        lambda m, x: m.b(m.a(x) + m.rows + m.columns),
        a=conv(2, 3),
        b=conv(3, 2),
        rows=nn.Parameter(torch.randn(1, 3, 19, 1)),
        columns=nn.Parameter(torch.randn(3, 1, 15)),
    ),
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.filterwarnings("ignore:.*(is bound to the size|not probed):fxstream.StreamingWarning")
def test_what_depends_on_the_position(name, batch):
    image = torch.randn(batch, 2, 21, 17, dtype=torch.double, requires_grad=True)
    plan = assert_streams(POSITIONS[name].double(), image, tile=11, segments=1, verify=batch == 1)
    assert len(plan.segments) == 1


@pytest.mark.parametrize("mode, shape", [("linear", (41,)), ("trilinear", (13, 12, 15))])
@pytest.mark.parametrize("factor", [2, 0.5, 1.7])
def test_interpolation_of_one_and_three_axes(mode, shape, factor):
    kind = nn.Conv1d if len(shape) == 1 else nn.Conv3d
    model = nn.Sequential(kind(2, 3, 3), nn.Upsample(scale_factor=factor, mode=mode), kind(3, 2, 2)).double()
    image = torch.randn(2, 2, *shape, dtype=torch.double, requires_grad=True)
    assert_streams(model, image, tile=11, segments=1)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "given", [{"size": (301, 299)}, {"scale_factor": 3}, {"size": (402, 398), "align_corners": True}]
)
def test_interpolation_in_float32_is_as_exact_as_torch(mode, given):
    model = Function(lambda m, x: m.b(F.interpolate(m.a(x), mode=mode, **given)), a=conv(2, 3), b=conv(3, 2))
    image = torch.randn(1, 2, 203, 201, requires_grad=True)
    streamed = fxstream.compile(model, tile=64, segments=1, verify="scale_factor" in given)
    found = [step(module, model, [image]) for module in (streamed, model)]
    assert streamed.plan.segments[0].tile_count > 8
    exact = step(model.double(), model, [image.detach().double().requires_grad_()])
    for name, wanted in exact.items():
        errors = [relative_error(of[name].double(), wanted) for of in found]
        assert errors[0] <= 2 * errors[1] + 1e-7, name


def test_interpolation_to_the_size_of_another_map():
    """As networks for segmentation do."""
    parts = {"down": conv(2, 3, stride=2, padding=1), "deep": conv(3, 3, stride=2, padding=1), "out": conv(5, 2)}

    def forward(m, x):
        deep = m.deep(F.relu(m.down(x)))
        up = F.interpolate(deep, size=x.shape[2:], mode="bilinear", align_corners=True)
        return m.out(torch.cat([x, up], 1))

    model = Function(forward, **parts).double()
    for size in ((37, 45), (64, 40)):
        image = torch.randn(2, 2, *size, dtype=torch.double, requires_grad=True)
        assert_streams(model, image, tile=26, segments=1, verify=size == (37, 45))


def test_tiles_with_other_tables_share_programs():
    model = nn.Sequential(conv(2, 3), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), conv(3, 2))
    compiled = fxstream.compile(model, tile=12, segments=1)
    compiled(torch.randn(1, 2, 90, 90))
    (stream,) = streams(compiled)
    assert len(stream.schedule.programs) < len(stream.schedule.tasks) // 4


PLAINLY = {
    "circular": lambda m, x: m.b(F.pad(m.a(x), (2, 1, 1, 2), "circular")),
    "a row times all": lambda m, x: m.b(m.a(x) * torch.linspace(0, 1, x.shape[3]).to(x)),
    "area": lambda m, x: m.b(F.interpolate(m.a(x), size=(31, 29), mode="area")),
    "antialiased": lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=0.7, mode="bilinear", antialias=True)),
    "group norm": lambda m, x: m.b(F.relu(F.group_norm(m.a(x), 2))),
    "instance norm": lambda m, x: m.b(F.relu(F.instance_norm(m.a(x)))),
    "layer norm over space": lambda m, x: m.b(F.layer_norm(m.a(x), m.a(x).shape[1:])),
    "spatial concatenation": lambda m, x: m.b(torch.cat([m.a(x), m.a(x)[:, :, ::2]], 2)),
    "spatial softmax": lambda m, x: m.b(m.a(x) * m.a(x).flatten(2).softmax(-1).view_as(m.a(x))),
    "roll": lambda m, x: m.b(torch.roll(m.a(x), (2, -3), (2, 3))),
    "flip": lambda m, x: m.b(m.a(x).flip(-1)),
    "mean over one axis": lambda m, x: m.b(m.a(x) + m.a(x).mean(2, keepdim=True)),
    "attention": lambda m, x: m.b(
        F.scaled_dot_product_attention(*[m.a(x).flatten(2).transpose(1, 2)] * 3)
        .transpose(1, 2)
        .reshape(m.a(x).shape)
    ),
}


@pytest.mark.parametrize("name", PLAINLY)
def test_what_is_not_local_is_computed_plainly(name):
    """Operators that the stream must not take, between two convolutions that it does."""
    model = Function(
        PLAINLY[name], a=conv(2, 4, padding=1, bias=False), b=nn.Sequential(conv(4, 6), nn.ReLU(), conv(6, 2))
    )
    image = torch.randn(2, 2, 23, 19, dtype=torch.double, requires_grad=True)
    assert_streams(model.double(), image, tile=13, segments=1)


@pytest.mark.parametrize("axes", [1, 3])
def test_one_and_three_axes(axes):
    kinds = {
        1: (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d, nn.ConvTranspose1d),
        3: (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.ConvTranspose3d),
    }
    convolution, max_pool, average_pool, transposed = kinds[axes]
    model = nn.Sequential(
        convolution(2, 3, 3, padding=1),
        max_pool(3, 2, 1),
        convolution(3, 3, 2, dilation=2),
        average_pool(2, 1, 1, ceil_mode=True, count_include_pad=False),
        transposed(3, 2, 3, 2, output_padding=1),
    )
    image = integer_image(2, 2, *((41,) if axes == 1 else (13, 12, 15)))
    assert_streams(make_integer(model), image, tile=13, segments=1, tolerance=0.0)


@pytest.mark.parametrize("segments", [1, 2, 3, ("0",), ("2", "4")])
def test_segments_chain(segments):
    model = make_integer(nn.Sequential(*(conv(2, 2, padding=1, stride=1 + i % 2) for i in range(6))))
    image = integer_image(1, 2, 67, 61)
    plan = assert_streams(model, image, tile=40, segments=segments, tolerance=0.0, verify=segments == 1)
    assert len(plan.segments) == (segments if isinstance(segments, int) else len(segments) + 1)


def test_cut_ends_the_stream():
    model = make_integer(nn.Sequential(*(conv(2, 2, padding=1) for _ in range(5))))
    plan = assert_streams(model, integer_image(1, 2, 21, 22), tile=12, cut="2", segments=1, tolerance=0.0)
    assert [s.segment.nodes for s in plan.segments] == [("conv2d", "conv2d_1", "conv2d_2")]


@pytest.mark.parametrize("size", [*range(33, 42), (40, 64), (7, 53), (1, 70)])
@pytest.mark.parametrize("tile", [19, 23, 32])
def test_no_alignment_of_size_and_tile(size, tile):
    model = nn.Sequential(conv(1, 2, 3, stride=2, padding=1), nn.MaxPool2d(3, 2, 1), conv(2, 2, 3, padding=1))
    extents = (size, size) if isinstance(size, int) else size
    image, probed = integer_image(1, 1, *extents), (size, tile) == (33, 19)
    assert_streams(make_integer(model), image, tile=tile, segments=1, tolerance=0.0, verify=probed)


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_input_channels(channels):
    model = make_integer(nn.Sequential(conv(channels, 2), conv(2, 2)))
    assert_streams(model, integer_image(2, channels, 14, 15), tile=8, tolerance=0.0, verify=channels == 3)


def test_tile_per_axis():
    model = make_integer(nn.Sequential(conv(2, 2), nn.ReLU(), conv(2, 2)))
    plan = assert_streams(model, integer_image(1, 2, 30, 30), tile=(30, 10), segments=1, tolerance=0.0)
    assert [len(tiles) for tiles in plan.segments[0].axes] == [1, 5]


def test_several_inputs_keywords_and_nested_outputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(2, 3, padding=1), conv(1, 3, 1)

        def forward(self, image, *, mask, scale=2):
            x = F.relu(self.a(image)) + self.b(mask)
            return {"map": (x * scale, 5), "mean": x.mean()}

    model = make_integer(Model())
    mask = integer_image(2, 1, 20, 18, requires_grad=False)
    assert_streams(model, integer_image(2, 2, 20, 18), tile=9, kwargs={"mask": mask, "scale": 3}, tolerance=1e-12)


def test_nan_and_infinity_flow_as_in_the_plain_network():
    model = make_integer(nn.Sequential(conv(1, 2), nn.ReLU(), conv(2, 1)))
    image = integer_image(1, 1, 30, 30, requires_grad=False)
    image[0, 0, 9, 9], image[0, 0, 20, 21] = torch.nan, torch.inf
    assert_streams(model, image, tile=11, tolerance=0.0)


def test_memory_formats():
    model = make_integer(nn.Sequential(conv(2, 2), conv(2, 2)))
    image = integer_image(2, 2, 19, 20, requires_grad=False)
    assert_streams(model, image.to(memory_format=torch.channels_last), tile=10, tolerance=0.0)
    assert_streams(model, image.transpose(2, 3), tile=10, tolerance=0.0, verify=False)
