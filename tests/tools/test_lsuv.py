"""LSUV: streamed against a plain computation that holds whole feature maps, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstream
from fxstream.machine.meter import measure


def outputs(model, path, batches):
    """All values of one layer's output over all batches, channels first: [C, values]."""
    found, layer = [], model.get_submodule(path)
    last = isinstance(layer, nn.Linear)
    handle = layer.register_forward_hook(lambda m, i, o: found.append(o.movedim(-1 if last else 1, 0).flatten(1)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(found, 1)


def plain_lsuv(model, order, batches, center=False):
    """The definition: layer by layer, the moments of its outputs, concatenated; transposed groups by hand."""
    for path in order:
        layer, found = model.get_submodule(path), outputs(model, path, batches)
        with torch.no_grad():
            for channel, values in enumerate(found):
                deviation = values.var(correction=0).sqrt()
                if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                    outs, ins = layer.out_channels // layer.groups, layer.in_channels // layer.groups
                    group = channel // outs
                    layer.weight[group * ins : (group + 1) * ins, channel % outs] /= deviation
                else:
                    layer.weight[channel] /= deviation
                if layer.bias is not None:
                    layer.bias[channel] -= values.mean() if center else 0
                    layer.bias[channel] /= deviation
    return model


class Branches(nn.Module):
    """Layers that run in another order than registered; strides, groups, a skip, a Linear after a pool."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.up = nn.ConvTranspose2d(6, 4, 4, 2, 1, groups=2)
        self.down = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + F.silu(self.up(self.down(x).relu()))
        return self.head(x.mean((2, 3)))


def images(*shapes):
    return [3 * torch.randn(*shape).double() + 1 for shape in shapes]


def axes_case(convolution, transposed, *extents):
    layers = convolution(2, 3, 3), nn.ReLU(), transposed(3, 4, 2, 2), nn.Tanh(), convolution(4, 2, 3)
    return nn.Sequential(*layers), ["0", "2", "4"], images((2, 2, *extents), (1, 2, *extents)), 8


CASES = {
    "branches": lambda: (
        Branches(),
        ["stem", "down", "up", "head"],
        images((2, 2, 24, 20), (1, 2, 32, 28), (3, 2, 18, 18)),
        13,
    ),
    "1-D": lambda: axes_case(nn.Conv1d, nn.ConvTranspose1d, 40),
    "3-D": lambda: axes_case(nn.Conv3d, nn.ConvTranspose3d, 9, 8, 11),
    "normalised": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)
        ),
        ["0", "2", "4"],
        images((2, 2, 20, 20), (2, 2, 20, 26)),
        12,
    ),
}


@pytest.mark.parametrize(
    "name, center", [("branches", False), ("branches", True), ("1-D", True), ("3-D", False), ("normalised", True)]
)
def test_equals_the_definition_on_whole_images(name, center):
    model, order, batches, tile = CASES[name]()
    wanted = plain_lsuv(copy.deepcopy(model.double()), order, batches, center)
    before = {n: b.clone() for n, b in model.named_buffers()}
    parameters = [id(p) for p in model.parameters()]
    assert fxstream.lsuv_(model, batches, tile=tile, center=center) is model
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    for (name, own), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert (own - other).norm() <= 1e-10 * other.norm(), name
    for path in order:
        found = outputs(model, path, batches)
        assert torch.allclose(found.var(1, correction=0), torch.ones(len(found)).double(), atol=1e-10)
        if center and model.get_submodule(path).bias is not None:
            assert found.mean(1).abs().max() < 1e-10


def test_one_scale_for_all_channels():
    model, order, batches, tile = CASES["branches"]()
    ratio = [model.double().get_submodule(path).weight.clone() for path in order]
    fxstream.lsuv_(model, batches, tile=tile, per_channel=False, center=True)
    for path, before in zip(order, ratio, strict=True):
        found, layer = outputs(model, path, batches), model.get_submodule(path)
        assert abs(found.var(correction=0) - 1) < 1e-10
        assert layer.bias is None or abs(found.mean()) < 1e-10
        assert (layer.weight / before).std() < 1e-12


def test_a_mean_far_from_zero_does_not_cancel():
    torch.manual_seed(0)
    values = 10000 + torch.randn(2, 1, 1, 40, 40)
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    deviation = values.double().std(correction=0).item()
    fxstream.lsuv_(model, list(values), tile=11)
    assert model[0].weight.abs().item() * deviation == pytest.approx(1, rel=1e-3)
    assert abs((values**2).mean() - values.mean() ** 2 - deviation**2) > 1  # of E[x^2] - mean^2 no digit is left


def test_orthogonal_weights_are_scaled_orthogonal_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).double()
    fxstream.lsuv_(model, images((1, 3, 20, 20)), tile=11, orthogonal=True)
    for layer in model[0], model[2]:
        rows = F.normalize(layer.weight.flatten(1))
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)).double(), atol=1e-12)


def test_several_arguments_a_dataset_and_a_compiled_module():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x, mask):
            return self.conv(x * mask)

    x, mask = torch.randn(4, 2, 20, 20), (torch.rand(4, 1, 20, 20) > 0.3).float()
    model = Masked()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, mask), batch_size=2)
    fxstream.lsuv_(fxstream.compile(model, tile=11), loader, tile=11)
    with torch.no_grad():
        assert torch.allclose(model(x, mask).var((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_within_a_memory():
    body = [nn.Conv2d(8, 8, 3, padding=1) if i % 2 else nn.ReLU() for i in range(6)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *body)
    batches = [torch.randn(1, 3, 384, 384)]
    plain = measure(lambda: outputs(model, "6", batches)).peak_bytes
    found = measure(lambda: fxstream.lsuv_(model, batches, memory="2MiB"))
    assert found.peak_bytes < 2 * 2**20 < plain / 4
    assert torch.allclose(outputs(model, "6", batches).var(1, correction=0), torch.ones(8), atol=1e-4)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.extra = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, x):
        return self.conv(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3)

    def forward(self, x):
        return self.last(self.conv(self.conv(x)))


def small():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))


def tied():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    model[1].weight = model[0].weight
    return model


def changed(path, value):
    model = small()
    nn.init.constant_(model.get_submodule(path).weight, value)
    return model


WRONG = {
    r"`extra` never runs: leave it out with skip=\['extra'\]": Unused,
    r"`conv` runs 2 times in a forward": Twice,
    r"`0` shares its parameters with another module": tied,
    r"weight of `0` is computed": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))),
    r"output of `2` over all batches is constant, of variance 0 in 2 of its 2 channels": lambda: changed("2", 0.0),
    r"output of `0` over all batches is not finite in 3 of its 3 channels": lambda: changed("0", float("nan")),
}


@pytest.mark.parametrize("message", WRONG)
def test_refused_and_the_model_is_as_before(message):
    model = WRONG[message]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fxstream.InputError, match=message):
        fxstream.lsuv_(model, [torch.randn(1, 2, 20, 20)], tile=11)
    after = model.state_dict()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=0, equal_nan=True) for name in before)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_skipped_stays():
    model = Twice()
    kept = model.conv.weight.clone()
    fxstream.lsuv_(model, [torch.randn(1, 2, 20, 20)], tile=11, skip=["conv"])
    assert torch.equal(model.conv.weight, kept)


@pytest.mark.parametrize(
    "batches, skip, message",
    [
        (iter([torch.randn(1, 2, 20, 20)]), (), "read once per layer.*found list_iterator"),
        (torch.randn(1, 2, 20, 20), (), "read once per layer.*found Tensor"),
        ([], (), "at least one batch"),
        ([torch.randn(1, 2, 20, 20)], ["layer9"], "none named 'layer9'"),
    ],
)
def test_arguments_that_make_no_sense(batches, skip, message):
    with pytest.raises(fxstream.InputError, match=message):
        fxstream.lsuv_(small(), batches, skip=skip, tile=11)
