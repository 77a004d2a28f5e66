"""Windows: reshapes that split stream axes by a constant and join them again, and attention inside windows."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_streams, captures, integer_image, make_integer, step
from small_networks import Function, conv
from torch import nn

import fxstream
from fxstream.rules import Reason


def image(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


def partitioned(x, window):
    """[N, H, W, C] as windows [N * windows, window * window, C]."""
    n, h, w, c = x.shape
    x = x.view(n, h // window, window, w // window, window, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window, c)


def reversed_windows(x, window, h, w):
    x = x.view(-1, h // window, w // window, window, window, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, h, w, x.shape[-1])


def mask_of(h, w, window, shift):
    """Which pixels of a window lay side by side before the shift, as 0 and -100."""
    regions = torch.zeros(1, h, w, 1, dtype=torch.double)
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            regions[:, rows, columns] = 3 * i + j
    regions = partitioned(regions, window).squeeze(-1)
    different = regions[:, None] - regions[:, :, None]
    return different.masked_fill(different != 0, -100.0).masked_fill(different == 0, 0.0)


class Attention(nn.Module):
    """A transformer block with attention inside windows, shifted by `shift`, padded to a multiple."""

    def __init__(self, window, shift=0, fused=False):
        super().__init__()
        self.window, self.shift, self.fused = window, shift, fused
        self.norm, self.qkv, self.project = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(2, window**2, window**2))

    def forward(self, x):
        n, h, w, c = x.shape
        window, y = self.window, self.norm(x)
        y = F.pad(y, (0, 0, 0, -w % window, 0, -h % window))
        _, high, wide, _ = y.shape
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = partitioned(y, window)
        q, k, v = self.qkv(y).reshape(y.shape[0], window**2, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = self.bias[None]
        if self.shift:
            mask = mask + mask_of(high, wide, window, self.shift).repeat(n, 1, 1)[:, None]
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = (q @ k.transpose(-2, -1) / 2 + mask).softmax(-1) @ v
        y = reversed_windows(self.project(y.transpose(1, 2).reshape(-1, window**2, c)), window, high, wide)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        return x + y[:, :h, :w]


class Windowed(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.first, self.blocks, self.last = nn.Conv2d(3, 8, 2, 2), nn.Sequential(*blocks), conv(8, 2)

    def forward(self, x):
        return self.last(self.blocks(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    "batch, fused, size",
    [
        (1, True, (25, 31)),
        (2, False, (24, 36)),
        pytest.param(1, False, (24, 36), marks=pytest.mark.campaign),
        pytest.param(2, True, (24, 36), marks=pytest.mark.campaign),
    ],
)
def test_attention_inside_windows(batch, fused, size):
    model = Windowed(Attention(3, fused=fused), Attention(2, fused=fused)).double()
    plan = assert_streams(model, image(batch, 3, *size), tile=17, segments=1, verify=batch == 1)
    assert plan.streamed_share > 0.99


@pytest.mark.parametrize(
    "fused, size", [(True, (25, 31)), pytest.param(False, (24, 36), marks=pytest.mark.campaign)]
)
def test_shifted_windows_stream_around_the_shift(fused, size):
    model = Windowed(Attention(3, fused=fused), Attention(3, 1, fused)).double()
    plan = assert_streams(model, image(2, 3, *size), tile=16)
    assert plan.streamed_share > 0.9


def test_one_capture_serves_every_multiple_of_the_window():
    model = Windowed(Attention(3), Attention(3, 1)).double()
    compiled = fxstream.compile(model, tile=16)
    for shape in ((1, 3, 24, 36), (2, 3, 30, 24), (1, 3, 36, 36)):
        x = image(*shape)
        assert torch.allclose(compiled(x), model(x), atol=1e-12)
        assert compiled.plan.streamed_share > 0.9
    assert captures(compiled) == 1


def test_windows_are_as_many_as_those_of_a_mask():
    """The mask is made first, for all blocks, and windows of the map are nonetheless parts of its own extents."""

    def forward(m, x):
        mask = mask_of(*x.shape[2:], 4, 2)
        x = m.a(x)
        n, c, h, w = x.shape
        windows = partitioned(x.permute(0, 2, 3, 1), 4).view(n, -1, 16, c)
        weights = (windows @ windows.mT / 9 + mask).softmax(-1)
        y = reversed_windows((weights @ windows).view(-1, 16, c), 4, h, w)
        return m.b(x + y.permute(0, 3, 1, 2))

    model = Function(forward, a=nn.Conv2d(2, 4, 3, padding=1), b=conv(4, 2)).double()
    plan = assert_streams(model, image(2, 2, 24, 32), tile=18)
    assert plan.streamed_share > 0.9


@pytest.mark.parametrize("extents", [(40, 40), (30, 38)])
def test_windows_of_an_image_smaller_than_the_steps_of_a_capture(extents):
    """Sizes that are tried and padded to the same multiple tell nothing of how many windows there are."""
    model = Windowed(Attention(14, fused=True), Attention(14))
    model.first = nn.Conv2d(3, 8, 16, 16)
    compiled = fxstream.compile(model.double(), tile=256, verify=False)
    for n in range(2):
        x = image(1, 3, *(16 * extent + 272 * n for extent in extents))
        assert torch.allclose(compiled(x), model(x), atol=1e-12)
        assert compiled.plan.streamed_share > 0.9
    assert captures(compiled) == 1


@pytest.mark.parametrize("share", [0.4, pytest.param(0.7, marks=pytest.mark.campaign)])
def test_within_a_memory(share):
    """Blocks before and after a shift read the same map; neither runs whole with what is shifted in between."""
    model, x = Windowed(Attention(3), Attention(3, 1), Attention(3)).double(), image(1, 3, 48, 48)
    memory = int(share * fxstream.plan(model, inputs=[x], memory=2**40).prediction.plain_bytes)
    compiled = fxstream.compile(model, memory=memory, verify=False)
    assert_same(step(compiled, model, [x]), step(model, model, [x]), 1e-10)
    assert compiled.plan.prediction.bytes <= memory


def test_windows_of_a_volume():
    def forward(m, x):
        x = m.a(x)
        n, c, d, h, w = x.shape
        y = x.view(n, c, d // 2, 2, h // 2, 2, w // 2, 2).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(-1, 8, c)
        y = m.linear(y - y.mean(1, keepdim=True))
        y = y.view(n, d // 2, h // 2, w // 2, 2, 2, 2, c).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(n, c, d, h, w)
        return m.b(x + y)

    model = make_integer(
        Function(forward, a=nn.Conv3d(1, 2, 3, padding=1), linear=nn.Linear(2, 2), b=nn.Conv3d(2, 1, 3))
    )
    plan = assert_streams(model, integer_image(2, 1, 8, 10, 12), tile=6, segments=1, tolerance=0.0)
    assert plan.streamed_share == 1


FORMS = {
    "space to depth by hand": lambda x, n, c, h, w: (
        x.view(n, c, h // 2, 2, w // 3, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, 6 * c, h // 2, w // 3)
    ),
    "depth to space by hand": lambda x, n, c, h, w: (
        x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
    ),
    "mean of windows": lambda x, n, c, h, w: x.view(n, c, h // 2, 2, w // 2, 2).mean((3, 5)),
    "windows along one axis": lambda x, n, c, h, w: x.reshape(n, c, h, w // 4, 4).softmax(-1).flatten(3),
    "unflatten": lambda x, n, c, h, w: x.unflatten(3, (-1, 4)).flip(-1).flatten(3),
    "windows of tokens": lambda x, n, c, h, w: (
        x.flatten(2).mT.sin().view(n, h // 2, 2, w // 3, 3, c).transpose(2, 3).softmax(-2).flatten(3)
    ),
    "as many windows as tokens": lambda x, n, c, h, w: (
        x.flatten(2)
        .mT.view(-1, h // 2, 2, w // 2, 2, c)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(-1, 4, c)
        .softmax(1)
        .sin()
        .view(n, h // 2, w // 2, 2, 2, c)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(n, h * w, c)
        .mT.view(n, c, h, w)
    ),
    "transforms of windows": lambda x, n, c, h, w: torch.fft.irfft2(
        torch.fft.rfft2(x.view(n, c, h // 4, 4, w // 6, 6).transpose(3, 4)).square(), (4, 6)
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_forms(name, batch):
    form = FORMS[name]
    model = Function(lambda m, x: form(m.a(x), *m.a(x).shape).tanh(), a=conv(2, 4, padding=1)).double()
    plan = assert_streams(model, image(batch, 2, 12, 24), tile=8, segments=1)
    assert plan.streamed_share == 1


def test_parts_of_a_map_are_far_apart():
    """Attention between pixels a part of the map away, as in a grid: a barrier, and a stream after it."""

    def forward(m, x):
        x = m.a(x)
        n, c, h, w = x.shape
        y = x.view(n, c, 2, h // 2, 3, w // 3).permute(0, 3, 5, 2, 4, 1)
        y = m.linear(y - y.mean((3, 4), keepdim=True))
        return m.b(x + y.permute(0, 5, 3, 1, 4, 2).reshape(n, c, h, w))

    model = make_integer(Function(forward, a=conv(2, 4, padding=1), linear=nn.Linear(4, 4), b=conv(4, 1)))
    analysis = fxstream.analyze(model, inputs=[(2, 2, 12, 18)])
    reasons = [v.answer.reason for v in analysis.barriers]
    assert set(reasons) == {Reason.SPLITS_TILED_DIM, Reason.JOINS_TILED_DIM}
    with pytest.warns(fxstream.StreamingWarning, match="splits a tiled dim"):
        plan = assert_streams(model, image(2, 2, 12, 18), tile=6)
    assert any("linear" in segment.segment.nodes for segment in plan.segments)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_a_size_that_is_equal_by_chance_splits_nothing():
    """Windows in a number that is that of another axis are none at other sizes: the graph stays as it is."""

    def forward(m, x):
        x = m.a(x)
        return m.b(x.reshape(x.shape[0], 4, x.shape[3] // 2, -1, x.shape[3]))

    model = Function(forward, a=conv(2, 4, padding=1), b=nn.Tanh()).double()
    compiled = fxstream.compile(model, tile=6)
    for shape in ((1, 2, 12, 12), (1, 2, 12, 24)):
        x = image(*shape)
        assert torch.allclose(compiled(x), model(x), atol=1e-12)
