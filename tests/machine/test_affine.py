"""Batch norm by the kernels of SyncBatchNorm, written here for a CPU: value and gradients are those of torch."""

import pytest
import torch

from fxstream.machine.kernels import affine


def per_channel(vector):
    return 1.0 if vector is None else vector.view(1, -1, 1, 1)


def elemt(tensor, weight, bias, mean, root, eps):
    shift = 0.0 if bias is None else per_channel(bias)
    return (tensor - per_channel(mean)) * per_channel(root) * per_channel(weight) + shift


def reduced(gradient, tensor, mean, root, weight, of_tensor, of_weight, of_bias):
    apart = (gradient * (tensor - per_channel(mean))).sum((0, 2, 3))
    sums = gradient.sum((0, 2, 3))
    return sums, apart, apart * root if of_weight else None, sums if of_bias else None


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
@pytest.mark.parametrize("has_weights", [True, False])
def test_value_and_gradients(monkeypatch, has_weights, needs):
    monkeypatch.setattr(torch, "batch_norm_elemt", elemt)
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", reduced)
    monkeypatch.setattr(affine, "_has_rows_of_channels", lambda tensor: True)
    image = torch.randn(2, 3, 5, 4, dtype=torch.double).to(memory_format=torch.channels_last)
    vectors = [torch.rand(3, dtype=torch.double) + 0.5 for _ in range(4)]
    operands = [image, *vectors[:2]] if has_weights else [image, None, None]
    results = []
    for function in (torch.ops.aten.batch_norm, affine.BATCH_NORM):
        leaves = [t if t is None else t.clone().requires_grad_(n) for t, n in zip(operands, needs, strict=True)]
        if not any(leaf is not None and leaf.requires_grad for leaf in leaves):
            return
        result = function(*leaves, *vectors[2:], False, 0.0, 1e-3, False)
        result.square().sum().backward()
        results.append([result.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for found, wanted in zip(*results, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_only_maps_of_rows_of_channels_on_cuda():
    assert not affine._has_rows_of_channels(torch.zeros(2, 3, 5, 4).to(memory_format=torch.channels_last))
