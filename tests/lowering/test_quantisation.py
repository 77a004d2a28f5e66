"""Fake quantisation with observers: ranges of whole maps from tiles, to the bit, and buffers updated once."""

import copy

import pytest
import torch
import torch.ao.quantization as tq
from torch import nn

import fxstream


def network():
    torch.manual_seed(0)
    first, second = (tq.FusedMovingAvgObsFakeQuantize(quant_min=0, quant_max=127) for _ in range(2))
    layers = [nn.Conv2d(3, 4, 3), first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), second]
    return nn.Sequential(*layers).train()


def weights_quantised():
    """As `prepare_qat` makes it: convolutions with a fake quantisation of their weights, and BatchNorm in them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")
    return tq.prepare_qat(tq.fuse_modules_qat(model, [["0", "1", "2"]]))


def observe(model, observes, quantises):
    for module in model.modules():
        if isinstance(module, tq.FakeQuantizeBase):
            module.enable_observer(observes), module.enable_fake_quant(quantises)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min:UserWarning")
@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("build", [network, weights_quantised])
def test_observers_see_the_whole_map_once(build):
    model = build()
    plain = copy.deepcopy(model)
    module = fxstream.compile(model, tile=18)
    for observes, quantises in ((True, True), (True, False), (False, True), (True, True)):
        observe(model, observes, quantises), observe(plain, observes, quantises)
        image = torch.randn(2, 3, 33, 37)
        found, expected = module(image), plain(image)
        assert sum(segment.tile_count > 1 for segment in module.plan.segments) > 2
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        found.square().sum().backward(), expected.square().sum().backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-2)
