"""Flattened positions: what follows a flatten streams on the map before it, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_streams, captures
from small_networks import Function, conv
from torch import nn

import fxstream
from fxstream.capture.capture import capture
from fxstream.rules.shuffled import align


def image(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


class AttentionPooling(nn.Module):
    """Attention-based multiple instance learning (Ilse, Tomczak, Welling, 2018) on a small network."""

    def __init__(self, gated=False):
        super().__init__()
        self.body = nn.Sequential(conv(3, 4, 3, stride=2, padding=1), nn.ReLU(), conv(4, 6, padding=1))
        self.v, self.u = nn.Linear(6, 5), nn.Linear(6, 5) if gated else None
        self.w, self.head = nn.Linear(5, 2), nn.Linear(12, 3)

    def forward(self, x):
        h = self.body(x).flatten(2).transpose(1, 2)
        a = torch.tanh(self.v(h))
        if self.u is not None:
            a = a * torch.sigmoid(self.u(h))
        a = torch.softmax(self.w(a), dim=1)
        return self.head((a.transpose(1, 2) @ h).flatten(1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_pooling(gated, batch):
    plan = assert_streams(
        AttentionPooling(gated).double(), image(batch, 3, 41, 37), tile=15, segments=1, verify=batch == 1
    )
    assert plan.streamed_share > 0.99


def test_one_capture_serves_every_size():
    model = AttentionPooling().double()
    compiled = fxstream.compile(model, tile=15)
    for shape in ((1, 3, 41, 37), (2, 3, 41, 37), (3, 3, 29, 50), (1, 3, 40, 40)):
        x = image(*shape)
        assert torch.allclose(compiled(x), model(x), atol=1e-12)
        assert compiled.plan.streamed_share > 0.99
    assert captures(compiled) == 1


def on_map(forward, **parts):
    """A function of the map of a small convolution and the map itself, behind another."""
    return Function(
        lambda m, x: forward(m, m.body(x)), body=nn.Sequential(conv(2, 4, padding=1), nn.Tanh()), **parts
    ).double()


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def non_local(m, x):
    """Keys and values are summed over positions first (Shen et al., "Efficient attention", 2021)."""
    n, c, h, w = x.shape
    q, k, v = m.qkv(tokens(x)).chunk(3, dim=-1)
    context = k.softmax(dim=1).transpose(1, 2) @ v
    return m.last((q.softmax(-1) @ context).transpose(1, 2).reshape(n, c, h, w) + x)


def global_context(m, x):
    n, c, h, w = x.shape
    mask = F.softmax(m.mask(x).view(n, 1, h * w), dim=2).unsqueeze(-1)
    context = torch.matmul(x.view(n, c, h * w).unsqueeze(1), mask).view(n, c, 1, 1)
    return x + m.transform(context)


def spatial_gate(m, x):
    n, _, h, w = x.shape
    return x * m.mask(x).view(n, -1).softmax(1).view(n, 1, h, w)


def instances(m, x):
    h = x.permute(0, 2, 3, 1).reshape(-1, 4)
    a = F.softmax(m.fc(h).transpose(1, 0), dim=1)
    return torch.mm(a, h)


torch.manual_seed(0)  # the modules are made once
STREAMED = {
    "mean of a view": on_map(lambda m, x: x.view(x.shape[0], x.shape[1], -1).mean(-1)),
    "sum, kept": on_map(lambda m, x: x.flatten(2).sum(-1, keepdim=True) * 2),
    "sum of all": on_map(lambda m, x: (x.flatten(1) ** 2).sum()),
    "maximum": on_map(lambda m, x: tokens(x).amax(1)),
    "place of the maximum": on_map(lambda m, x: x.flatten(1).argmax() + x.flatten(2).sum(-1)),
    "norm": on_map(lambda m, x: F.normalize(x.flatten(2).mean(-1) + x.flatten(2).norm(dim=-1), dim=1)),
    "logsumexp": on_map(lambda m, x: x.flatten(2).logsumexp(-1)),
    "channels": on_map(
        lambda m, x: m.norm(m.fc(tokens(x))).relu().mean(1), fc=nn.Linear(4, 6), norm=nn.LayerNorm(6)
    ),
    "heads": on_map(lambda m, x: (x.flatten(2).reshape(x.shape[0], 2, 2, -1).softmax(2) ** 2).sum(-1)),
    "global context": on_map(
        global_context, mask=conv(4, 1, 1), transform=nn.Sequential(conv(4, 2, 1), nn.ReLU(), conv(2, 4, 1))
    ),
    "efficient attention": on_map(non_local, qkv=nn.Linear(4, 12), last=conv(4, 2)),
    "covariance": on_map(lambda m, x: x.flatten(2) @ tokens(x)),
    "bilinear": on_map(lambda m, x: torch.bmm(x.flatten(2), m.a(x).flatten(2).transpose(1, 2)), a=conv(4, 3, 1)),
    "einsum": on_map(lambda m, x: torch.einsum("nchw,nkhw->nck", x, m.a(x).softmax(1)), a=conv(4, 3, 1)),
    "einsum, flat": on_map(
        lambda m, x: torch.einsum("ncp,nkp->nck", x.flatten(2), m.a(x).flatten(2).softmax(-1)), a=conv(4, 3, 1)
    ),
    "gate of positions": on_map(spatial_gate, mask=conv(4, 1, 1)),
    "instances of all images": on_map(instances, fc=nn.Linear(4, 2)),
    "embedding of positions": on_map(
        lambda m, x: (tokens(x) + m.embedding).relu().mean(1), embedding=nn.Parameter(torch.randn(1, 23 * 19, 4))
    ),
    "masked": on_map(
        lambda m, x: x.flatten(2).masked_fill(m.a(x).flatten(2) > 0, -torch.inf).softmax(-1).square().sum(-1),
        a=conv(4, 1, 1),
    ),
    "log softmax": on_map(lambda m, x: (x.flatten(2).log_softmax(-1) * x.flatten(2)).mean((1, 2))),
    "normalised": on_map(lambda m, x: m.norm(x.flatten(2)).relu().mean(-1), norm=nn.BatchNorm1d(4)),
    "single pixels": on_map(lambda m, x: m.a(x.flatten(2)).relu().sum(-1), a=nn.Conv1d(4, 3, 1)),
    "single pixels of several patches": on_map(
        lambda m, x: m.a(m.norm(torch.stack([x, x.sin(), x.cos()], 2).flatten(3))).relu().sum(-1),
        a=nn.Conv2d(4, 6, (3, 1), 1, (1, 0), groups=2),
        norm=nn.GroupNorm(2, 4),
    ),
    "rows of distances": on_map(
        lambda m, x: (
            F.pad(
                F.pad((m.a(x).flatten(2).mT @ m.distances).flatten(0, 1).unflatten(1, (2, 3)), (0, 1)).flatten(1),
                (1, 0),
            )
            .unflatten(1, (3, 3))[:, :2, 1:]
            .reshape(x.shape[0], -1, 2, 1, 2)
            .expand(-1, -1, -1, 3, -1)
            .sin()
            .sum(1)
        ),
        a=conv(4, 3, 1),
        distances=nn.Parameter(torch.randn(3, 6)),
    ),
    "apart": on_map(
        lambda m, x: torch.cat([*x.flatten(2).chunk(2, 1)[::-1], x.flatten(2)], 1).select(1, 1).mean(-1)
    ),
    "dice of a view": on_map(
        lambda m, x: (
            (x.sigmoid().reshape(x.shape[0], -1) * x.relu().reshape(x.shape[0], -1)).sum(1)
            / (x.sigmoid().reshape(x.shape[0], -1).sum(1) + 1)
        )
    ),
}


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_positions_stream(name, batch):
    plan = assert_streams(STREAMED[name], image(batch, 2, 23, 19), tile=11, segments=1, verify=batch == 1)
    assert plan.streamed_share > 0.95, plan


PLAINLY = {
    "sorted": on_map(lambda m, x: x.flatten(2).sort(-1)[0].cumsum(-1)),
    "attention": on_map(
        lambda m, x: m.last(F.scaled_dot_product_attention(tokens(x), tokens(x), tokens(x))), last=nn.Linear(4, 2)
    ),
    "attention by hand": on_map(lambda m, x: (tokens(x) @ x.flatten(2)).softmax(-1) @ tokens(x)),
    "a class token": on_map(
        lambda m, x: m.fc(torch.cat([x.mean((2, 3)).unsqueeze(1), tokens(x)], 1)), fc=nn.Linear(4, 2)
    ),
    "transposed map": on_map(lambda m, x: x.flatten(2).view(x.shape[0], 4, x.shape[3], x.shape[2])),
    "every second": on_map(lambda m, x: x.flatten(2)[:, :, ::2].mean(-1)),
    "some positions": on_map(lambda m, x: tokens(x)[:, 3] + tokens(x).max(1)[0]),
    "weights of positions": on_map(lambda m, x: m.fc(x.flatten(2)), fc=nn.Linear(23 * 19, 3)),
    "classifier": on_map(lambda m, x: m.fc(x.flatten(1)), fc=nn.Linear(4 * 23 * 19, 3)),
    "random": on_map(lambda m, x: F.dropout(x.flatten(2), 0.0).mean(-1)),
    "squeezed batch": on_map(lambda m, x: x.flatten(2).squeeze(0).mean(-1)),
}


@pytest.mark.parametrize("name", PLAINLY)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_what_does_not_stream_stays_right(name, batch):
    assert_streams(PLAINLY[name], image(batch, 2, 23, 19), tile=11, segments=1, verify=batch == 1)


@pytest.mark.parametrize("name", [*STREAMED, *PLAINLY])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_rewritten_graphs_hold_at_every_size(name):
    """First a square image alone, where many sizes are equal, then others."""
    model = (STREAMED | PLAINLY)[name]
    if name in ("embedding of positions", "weights of positions", "classifier"):
        pytest.skip("bound to its size")
    compiled = fxstream.compile(model, tile=9, segments=1)
    for shape in ((1, 2, 16, 16), (2, 2, 16, 16), (4, 2, 20, 12), (2, 2, 12, 21)):
        x = image(*shape)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-12, rtol=1e-10, equal_nan=True)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
def test_queries_keys_and_values_of_a_batch_as_one(batch):
    """In a model that is bound to its batch, which a constant says."""

    def forward(m, x):
        n, c, h, w = x.shape
        qkv = m.qkv(tokens(x)).view(n, h * w, 3, c).permute(2, 0, 1, 3).reshape(3 * batch, 23, 19, c)
        return m.last(qkv.permute(0, 3, 1, 2).tanh()).relu().view(3, batch, 2, 23, 19).sum(0)

    plan = assert_streams(
        on_map(forward, qkv=nn.Linear(4, 12), last=conv(4, 2, padding=1)), image(batch, 2, 23, 19), tile=11
    )
    assert plan.streamed_share > 0.95, plan


@pytest.mark.parametrize("batch", [1, 3])
def test_signals(batch):
    parts = {"a": nn.Conv1d(2, 4, 3, padding=1), "score": nn.Conv1d(4, 2, 1)}

    def forward(m, x):
        h = m.a(x)
        return m.score(h).softmax(-1) @ h.transpose(1, 2), (h * h.softmax(2)).amax(-1)

    plan = assert_streams(
        Function(forward, **parts).double(), image(batch, 2, 61), tile=17, segments=1, verify=batch == 1
    )
    assert plan.streamed_share > 0.95


def test_volumes():
    model = Function(
        lambda m, x: (m.a(x).flatten(2).softmax(-1) * m.a(x).flatten(2)).sum(-1), a=nn.Conv3d(1, 3, 3, padding=1)
    )
    plan = assert_streams(model.double(), image(2, 1, 11, 9, 13), tile=7, segments=1)
    assert plan.streamed_share > 0.95


@pytest.mark.parametrize("options", [{}, {"fuse_add": True, "fuse_scale": False}])
def test_global_context_of_timm(options):
    from timm.layers.global_context import GlobalContext

    block = GlobalContext(8, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(conv(2, 8, padding=1), nn.ReLU(), block, conv(8, 2)).double()
    plan = assert_streams(model, image(2, 2, 27, 22), tile=11, segments=1)
    assert plan.streamed_share > 0.95


@pytest.mark.parametrize("batch", [1, 3])
def test_losses_of_flat_logits(batch):
    def flat(z):
        return z.permute(0, 2, 3, 1).reshape(-1, 5)

    def forward(m, x, t):
        z = m.a(x)
        loss = F.cross_entropy(flat(z), t.reshape(-1), ignore_index=2, label_smoothing=0.1)
        each = F.cross_entropy(z.flatten(2), t.flatten(1), reduction="none").mean(1)
        binary = F.binary_cross_entropy_with_logits(z[:, 0].reshape(-1), (t == 1).to(z.dtype).reshape(-1))
        return loss, each, binary, F.mse_loss(flat(z), flat(z.tanh()))

    model = Function(forward, a=conv(2, 5, padding=1)).double()
    plan = assert_streams(
        model, image(batch, 2, 23, 19), torch.randint(0, 5, (batch, 23, 19)), tile=11, segments=1
    )
    assert plan.streamed_share > 0.99


def test_a_graph_without_flattened_positions_is_left_alone():
    model, x = nn.Sequential(conv(2, 3), nn.ReLU()), image(1, 2, 20, 20)
    captured, values = capture(model.double(), (x,), {})
    assert fxstream.compiler.analysis.lowered(captured, values) is captured


def test_a_map_of_which_only_the_size_is_read_is_not_computed():
    model = Function(
        lambda m, x: m.a(x) * m.a(x).flatten(2).softmax(-1).view_as(m.b(x)), a=conv(2, 3), b=conv(2, 3)
    ).double()
    plan = assert_streams(model, image(2, 2, 23, 19), tile=11, segments=1)
    assert not any("conv2d_2" in s.segment.nodes for s in plan.segments)


def test_which_dims_become_which():
    assert align((1, 1, 8, 9), (72,)) == [(range(4), range(1))]
    assert align((1, 4, 8, 9), (1, 4, 72)) == [
        (range(1), range(1)),
        (range(1, 2), range(1, 2)),
        (range(2, 4), range(2, 3)),
    ]
    assert align((3, 8, 9, 1), (3, 72)) == [(range(1), range(1)), (range(1, 4), range(1, 2))]
