"""Attention over all positions: queries stream, keys and values are whole."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams, captures
from small_networks import Function, conv
from torch import nn

import fxstream


def image(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


class Attention(nn.Module):
    """Attention of all positions of a map to those of the map, or of one made smaller by `reduction`."""

    def __init__(self, fused=False, reduction=0, bias=0, by_heads=False):
        super().__init__()
        self.fused, self.by_heads = fused, by_heads
        self.first, self.last, self.norm = conv(3, 8, padding=1), conv(8, 2), nn.LayerNorm(8)
        self.q, self.kv, self.project = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.reduction = nn.Conv2d(8, 8, reduction, reduction) if reduction else None
        self.bias = nn.Parameter(torch.randn(2, bias, bias)) if bias else None

    def forward(self, x):
        x = self.first(x)
        n, c, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, source = self.q(tokens).reshape(n, -1, 2, 4).transpose(1, 2), tokens
        if self.reduction is not None:
            source = self.reduction(tokens.transpose(1, 2).reshape(n, c, h, w)).flatten(2).transpose(1, 2)
        k, v = self.kv(source).reshape(n, -1, 2, 2, 4).permute(2, 0, 3, 1, 4)
        y = self.project(self.attended(q, k, v).transpose(1, 2).reshape(n, -1, c))
        return self.last((tokens + y).transpose(1, 2).reshape(n, c, h, w))

    def attended(self, q, k, v):
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        if self.by_heads:
            q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
            return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).unflatten(0, (-1, 2))
        scores = q @ k.transpose(-2, -1) / 2
        return (scores if self.bias is None else scores + self.bias).softmax(-1) @ v


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", [{}, {"reduction": 4}, {"by_heads": True}], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_queries_stream(fused, options, batch):
    if fused and "by_heads" in options:
        pytest.skip("a fused call has heads of its own")
    model = Attention(fused, **options).double()
    plan = assert_streams(model, image(batch, 3, 16, 20), tile=8, verify=batch == 1 and not model.by_heads)
    assert plan.streamed_share > 0.85, plan


@pytest.mark.filterwarnings("ignore:Attention is bound")
@pytest.mark.parametrize("fused", [False, True])
def test_a_bias_of_every_pair_of_positions(fused):
    model = Attention(fused, bias=12 * 16).double()
    plan = assert_streams(model, image(2, 3, 12, 16), tile=7, verify=False)
    assert plan.streamed_share > 0.85, plan


class RelativePositions(nn.Module):
    """Attention with scores of relative rows and columns, as MViT and SAM add them, to a map of `keys` a side."""

    def __init__(self, extents, reduction):
        super().__init__()
        self.first, self.last, self.qkv = conv(3, 8, padding=1), conv(8, 2), nn.Linear(8, 24)
        self.pool, places = nn.MaxPool2d(reduction), [(n, n // reduction) for n in extents]
        self.rows, self.columns = (nn.Parameter(torch.randn(n + m, 4)) for n, m in places)
        for name, (n, m), step in zip(("of_rows", "of_columns"), places, (reduction, reduction), strict=True):
            self.register_buffer(name, torch.arange(n)[:, None] - step * torch.arange(m)[None] + m * step - step)

    def forward(self, x):
        x = self.first(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        q, k, v = self.qkv(x).reshape(n, h, w, 3, 2, 4).permute(3, 0, 4, 1, 2, 5)
        k, v = (self.pool(t.movedim(-1, 2).flatten(0, 1)).unflatten(0, (n, 2)).movedim(2, -1) for t in (k, v))
        flat = [t.reshape(n, 2, -1, 4) for t in (q, k, v)]
        scores = (flat[0] * 0.5) @ flat[1].transpose(-2, -1)
        of_rows = torch.einsum("byhwc,hkc->byhwk", q, self.rows[self.of_rows % len(self.rows)])
        of_columns = torch.einsum("byhwc,wkc->byhwk", q, self.columns[self.of_columns % len(self.columns)])
        scores = scores.view(n, 2, h, w, k.shape[2], k.shape[3])
        scores = scores + of_rows[..., :, None] + of_columns[..., None, :]
        y = scores.view(n, 2, h * w, -1).softmax(-1) @ flat[2]
        y = y.view(n, 2, h, w, 4).permute(0, 2, 3, 1, 4).reshape(n, h, w, c)
        return self.last((x + y).permute(0, 3, 1, 2))


@pytest.mark.filterwarnings("ignore:RelativePositions is bound")
@pytest.mark.parametrize("batch, reduction, tile", [(1, 2, 7), (2, 1, 6)])
def test_relative_positions_along_each_axis(batch, reduction, tile):
    model = RelativePositions((12, 16), reduction).double()
    plan = assert_streams(model, image(batch, 3, 12, 16), tile=tile, verify=False)
    assert plan.streamed_share > 0.8, plan


@pytest.mark.parametrize("batches", [(2, 3, 4), (1, 1, 1)])
def test_one_capture_serves_every_size(batches):
    model = Attention(reduction=4).double()
    compiled = fxstream.compile(model, tile=8)
    for batch, extents in zip(batches, ((16, 20), (24, 16), (28, 36)), strict=True):
        x = image(batch, 3, *extents)
        assert torch.allclose(compiled(x), model(x), atol=1e-12)
        assert compiled.plan.streamed_share > 0.9
    assert captures(compiled) == 1


class ChannelAttention(nn.Module):
    """Attention between channels (Restormer): products of two maps, summed over positions."""

    def __init__(self):
        super().__init__()
        self.qkv, self.last = conv(3, 12, padding=1), conv(4, 2)

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = (t.reshape(n, 2, 2, h * w) for t in self.qkv(x).chunk(3, 1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return self.last(((q @ k.transpose(-2, -1)).softmax(-1) @ v).reshape(n, 4, h, w))


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_between_channels(batch):
    plan = assert_streams(ChannelAttention().double(), image(batch, 3, 18, 22), tile=9)
    assert plan.streamed_share > 0.95, plan


class Tokens(nn.Module):
    """Patches as tokens, with blocks of attention and perceptrons and a mean over tokens."""

    def __init__(self, tokens, blocks=2):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.place = nn.Parameter(torch.randn(1, tokens, 8))
        make = nn.TransformerEncoderLayer
        self.blocks = nn.ModuleList(
            [make(8, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(blocks)]
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.filterwarnings("ignore:Tokens is bound")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_transformer_of_patches(batch):
    plan = assert_streams(Tokens(48).double(), image(batch, 3, 24, 32), tile=12, verify=False)
    assert plan.streamed_share > 0.8, plan


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_at_each_position(bias, batch):
    """Of a few tokens that a pixel has, as of the frames of a video, on a map that is never flat."""

    def forward(m, x):
        y = m.a(x).unflatten(1, (4, 2)).permute(0, 3, 4, 1, 2)
        q, k, v = m.qkv(y).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias if bias else None)
        return m.b(y.permute(0, 3, 4, 1, 2).flatten(1, 2))

    model = Function(
        forward,
        a=conv(3, 8, padding=1),
        qkv=nn.Linear(2, 6),
        bias=nn.Parameter(torch.randn(4, 4)),
        b=conv(8, 2),
    )
    plan = assert_streams(model.double(), image(batch, 3, 17, 21), tile=9, segments=1, verify=batch == 1)
    assert plan.streamed_share == 1
