"""The streamed share counts every result that depends on the image, with tiled dims or without: shares by hand."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import Function
from torch import nn

import fxstream
from fxstream.machine.meter import measure
from fxstream.report.summary import summarise
from fxstream.tiling.parts import streamable_share


def windows(m, x):
    """Attention in windows of 4 x 4 pixels that were sorted before, and so have no order in space."""
    y = F.relu(m.b(F.relu(m.a(x)))).flatten(2).sort(-1).values
    y = y.view(1, 4, 8, 4, 8, 4).permute(0, 2, 4, 3, 5, 1).reshape(64, 16, 4)
    q, k, v = m.qkv(y).chunk(3, -1)
    return F.relu((q @ k.transpose(1, 2)).softmax(-1) @ v)


def tokens(m, x):
    """An MLP of sorted patches, which are no positions in groups of 16."""
    y = F.relu(m.a(x)).flatten(2).transpose(1, 2).sort(1).values.reshape(-1, 16, 8)
    return m.c(F.gelu(m.b(y)))


def of_windows():
    """In maps of 4 channels: 4 streamed; flat, sorted; 3 to windows; 3 and 3; keys; 4 and 4; result, relu."""
    parts = {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1), "qkv": nn.Linear(4, 12)}
    return Function(windows, **parts), 4, 26


def of_tokens():
    """In maps of 8 channels: convolution, relu, channels last are streamed; flat, sorted, groups; 4, 4; result."""
    parts = {"a": nn.Conv2d(3, 8, 4, 4), "b": nn.Linear(8, 32), "c": nn.Linear(32, 8)}
    return Function(tokens, **parts), 3, 15


@pytest.mark.filterwarnings("ignore:.*is bound to the size")
@pytest.mark.parametrize("case", [of_windows, of_tokens])
def test_the_share_is_that_of_all_results_that_depend_on_the_image(case):
    model, streamed, total = case()
    plan = fxstream.plan(model, 32, tile=16)
    assert plan.streamed_share == pytest.approx(streamed / total)
    assert f"{streamed / total:.0%} of the activations streamed" in str(plan)
    analysis = fxstream.analyze(model, 32)
    assert streamable_share(analysis.graph) == pytest.approx(streamed / total)
    assert f"{streamed / total:.1%} of the activations" in str(analysis)
    assert summarise(analysis, "model").streamed_share == pytest.approx(streamed / total)
    compiled = fxstream.compile(model, tile=16, verify=False)
    with pytest.warns(fxstream.StreamingWarning, match=f"^{streamed / total:.0%} of the activations"):
        compiled(torch.randn(1, 3, 32, 32))
    assert fxstream.inspect(compiled).last.plan.streamed_share == plan.streamed_share


def masked(m, x):
    """A mask that follows from the size alone."""
    rows, columns = (torch.arange(x.shape[d]) for d in (2, 3))
    mask = (rows[:, None] - columns[None]).abs() * -1.0
    return m.b(F.relu(m.a(x))) + mask.exp()


def test_what_follows_from_the_size_alone_is_in_the_prediction():
    """The mask lies there while maps are streamed."""
    model = Function(masked, a=nn.Conv2d(3, 1, 3, padding=1), b=nn.Conv2d(1, 1, 3, padding=1)).eval()
    compiled, image = fxstream.compile(model, tile=32, verify=False), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        compiled(image)
        peak = measure(lambda: compiled(image)).peak_bytes
    plan = fxstream.plan(model, 128, tile=32, training=False)
    assert plan.segments
    assert plan.prediction.bytes == pytest.approx(peak, rel=0.05)


def test_a_mask_has_no_gradient_in_the_prediction():
    node = fxstream.analyze(Function(masked, a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(1, 1, 1)), 16).graph["exp"]
    assert node.is_constant
    assert not node.has_gradient


def test_attention_is_predicted_as_the_kernel_of_the_device_saves():
    """No weights of all pairs."""

    def forward(m, x):
        y = m.a(x).flatten(2).transpose(1, 2).sort(1).values.unsqueeze(1).contiguous()
        return F.scaled_dot_product_attention(y, y, y)

    model = Function(forward, a=nn.Conv2d(3, 8, 1))
    image = torch.randn(1, 3, 32, 32)
    plain = measure(lambda: model(image).sum().backward()).peak_bytes
    assert fxstream.plan(model, 32, tile=16).prediction.plain_bytes == pytest.approx(plain, rel=0.2)
