"""Tokens of patches, beside tokens of another kind: an axis of positions of their own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_streams, captures, step
from small_networks import Function, conv
from torch import nn

import fxstream
from fxstream.errors import ProbeError
from fxstream.geometry.receptive_field import AxisMap
from fxstream.graph.autograd_saves import saves_of
from fxstream.rules import mapwide, register_rule, unregister_rule
from fxstream.rules.ops import overload

pytestmark = pytest.mark.filterwarnings("ignore:VisionTransformer is bound")


def image(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


class Block(nn.Module):
    """Attention and a perceptron, with heads as torchvision, timm or a user writes them."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        y = self.norms[0](x)
        if self.how == "torch":
            y, _ = self.attention(y, y, y, need_weights=False)
        else:
            n, t, c = y.shape
            q, k, v = self.qkv(y).reshape(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            if self.how == "fused":
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
            y = self.project(y.transpose(1, 2).reshape(n, t, c))
        x = x + y
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Patches of 4 pixels a side, `more` tokens before them, two blocks and a head."""

    def __init__(self, patches, how="fused", head="class", more=1):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.more, self.places = (nn.Parameter(torch.randn(1, n, 16)) for n in (more, patches + more))
        self.blocks = nn.Sequential(Block(how), Block(how))
        self.norm, self.last, self.count = nn.LayerNorm(16), nn.Linear(16, 3), more
        self.query, self.kv = nn.Parameter(torch.randn(1, 2, 1, 8)), nn.Linear(16, 32)
        self.head = getattr(self, f"{head}_head")

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.more.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.last(self.head(self.norm(self.blocks(x))))

    def class_head(self, x):
        return x[:, 0]

    def mean_head(self, x):
        return x[:, self.count :].mean(1)

    def pooled_head(self, x):
        n, t, _ = x.shape
        k, v = self.kv(x).reshape(n, t, 2, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(self.query.expand(n, -1, -1, -1), k, v).flatten(1)


@pytest.mark.parametrize("batch, tile", [(1, 9), (2, 16)])
@pytest.mark.parametrize("head", ["class", "mean", "pooled"])
@pytest.mark.parametrize("how", ["torch", "fused", "written"])
def test_a_class_token_among_patches(how, head, batch, tile):
    model = VisionTransformer(5 * 7, how, head).double()
    plan = assert_streams(model, image(batch, 3, 20, 28), tile=tile)
    assert plan.streamed_share > 0.85, plan


@pytest.mark.parametrize("share", [0.25, pytest.param(0.5, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("head, more", [("class", 1), ("pooled", 3)])
def test_within_a_memory(head, more, share):
    model, x = VisionTransformer(23 * 25, "fused", head, more).double(), image(1, 3, 92, 100)
    memory = int(share * fxstream.plan(model, inputs=[x], memory=2**40).prediction.plain_bytes)
    compiled = fxstream.compile(model, memory=memory)
    assert_same(step(compiled, model, [x]), step(model, model, [x]), 1e-10)
    assert compiled.plan.prediction.bytes <= memory
    assert compiled.plan.streamed_share > 0.5, compiled.plan


class Rotary(nn.Module):
    """Attention with rotary positions for the patches, and `more` tokens before them as they are, as in timm."""

    def __init__(self, more):
        super().__init__()
        self.patches, self.qkv, self.last = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 3)
        self.tokens, self.more = nn.Parameter(torch.randn(1, more, 16)), more

    def forward(self, x):
        x = self.patches(x)
        places = torch.arange(x.shape[2])[:, None] * 0.5 + torch.arange(x.shape[3])[None] * 0.3
        angles = places.flatten()[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1, 2.0, 0.2, 2.0, 0.2])
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (self.rotated(one, angles.to(x)) for one in (q, k))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        return self.last(x)

    def rotated(self, x, angles):
        before, x = x[:, :, : self.more], x[:, :, self.more :]
        first, second = x.chunk(2, -1)
        turned = x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
        return torch.cat([before, turned], 2)


@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_positions(batch, more):
    plan = assert_streams(Rotary(more).double(), image(batch, 3, 20, 28), tile=12)
    assert plan.streamed_share > 0.75, plan


class NormalisedTokens(nn.Module):
    """Tokens of patches as rows of one matrix, whose columns a BatchNorm normalises, as in LeViT."""

    def __init__(self):
        super().__init__()
        self.patches, self.linear, self.norm = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last, self.order = conv(8, 2), torch.tensor([5, 3, 0, 1, 7, 2, 4, 6])

    def forward(self, x):
        n, _, h, w = (x := self.patches(x)).shape
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(self.linear(x).flatten(0, 1)).reshape_as(x)
        y = y[:, :, self.order] + y[..., [[0]], [[1]]]
        return self.last((x + y).transpose(1, 2).reshape(n, -1, h, w))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_normalised_per_channel(batch, training):
    model = NormalisedTokens().double().train(training)
    plan = assert_streams(model, image(batch, 3, 22, 26), tile=7)
    assert plan.streamed_share > 0.85, plan


def test_tokens_as_a_map_again():
    """Without the token of another kind they are two axes again, not windows of one."""

    def forward(m, x):
        x = m.a(x).flatten(2).transpose(1, 2)
        x = m.block(torch.cat([x, m.token.expand(len(x), -1, -1)], 1))[:, :-1]
        return m.b(x.transpose(1, 2).reshape(-1, 16, 7, 9))

    last = nn.Sequential(conv(16, 16, padding=1), nn.Upsample(scale_factor=2), conv(16, 2))
    model = Function(forward, a=nn.Conv2d(3, 16, 4, 4), block=Block("fused"), b=last)
    model.token = nn.Parameter(torch.randn(1, 1, 16))
    plan = assert_streams(model.double(), image(2, 3, 28, 36), tile=11)
    assert len(plan.segments[-1].axes) == 2
    assert plan.streamed_share > 0.85, plan


def test_one_capture_serves_every_size():
    def forward(m, x):
        x = m.a(x).flatten(2).transpose(1, 2)
        return m.block(torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1))[:, 0]

    model = Function(forward, a=nn.Conv2d(3, 16, 4, 4), block=Block("fused"))
    model.token = nn.Parameter(torch.randn(1, 1, 16))
    compiled = fxstream.compile(model.double(), tile=11)
    for shape in ((1, 3, 28, 36), (2, 3, 20, 44), (3, 3, 52, 24)):
        x = image(*shape)
        assert torch.allclose(compiled(x), model(x), atol=1e-12)
        assert compiled.plan.streamed_share > 0.85
    assert captures(compiled) == 1


def test_one_position_needs_no_other():
    """What only the class token's result needs of the last block is computed for that alone."""
    model, x = VisionTransformer(5 * 7).double(), image(1, 3, 20, 28)
    last = fxstream.plan(model, inputs=[x], tile=28).segments[-1]
    assert {last.largest(name) for name, _ in last.segment.spatial} == {(1,)}, last


def test_weights_of_all_pairs_are_not_saved():
    """Asked on the device, a fused kernel saves a number per query beside its inputs and its result."""
    graph = fxstream.analyze(VisionTransformer(32 * 32), inputs=[(1, 3, 128, 128)]).graph
    names = [name for name, node in graph.nodes.items() if node.node.target is overload("attention")]
    assert len(names) == 2
    assert all(saves.extra < 4 for name, saves in saves_of(graph).items() if name in names)


def test_a_rule_of_attention_that_is_wrong_is_found():
    def late(call):
        answer = mapwide.attention(call)
        query, *others = answer.reads
        return replace(answer, reads=(replace(query, maps=(AxisMap.shifted(1),)), *others))

    unregister_rule("fxstream::attention")
    register_rule("fxstream::attention")(late)
    try:
        with pytest.raises(ProbeError, match="attention"):
            fxstream.compile(VisionTransformer(5 * 7).double(), tile=9)(image(1, 3, 20, 28))
    finally:
        unregister_rule("fxstream::attention")
        register_rule("fxstream::attention", "contraction")(mapwide.attention)
