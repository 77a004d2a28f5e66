"""Models whose blocks FSDP2 has sharded: gathered for a call, with the gradients of the unsharded model."""

import copy
import json
import os
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxstream

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("sharing"),
]
WAYS = ("whole", "blocks, root, compile", "compile, blocks, root", "compile, group, root")


class Blocks(nn.Module):
    """Three blocks and a head, with a state in Python."""

    def __init__(self, normalise=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, 4, 3, bias=False), normalise(4), nn.Tanh()) for channels in (3, 4, 4)
        )
        self.head, self.calls = nn.Conv2d(4, 2, 3), 0

    def forward(self, x):
        self.calls += 1
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sharded(model, way, mesh, policies, **request):
    """The model, compiled and sharded in one of `WAYS`, and the module to call."""
    from torch.distributed.fsdp import fully_shard

    of_blocks, of_root = policies
    run = fxstream.compile(model, **request) if way != "blocks, root, compile" and request else model
    if "blocks" in way:
        for part in (*model.blocks, model.head):
            fully_shard(part, mesh=mesh, **of_blocks)
    if "group" in way:
        fully_shard([*model.blocks, model.head], mesh=mesh, **of_blocks)
    run = fully_shard(run, mesh=mesh, **of_root)
    return fxstream.compile(run, **request) if way == "blocks, root, compile" and request else run


def image(seed):
    return torch.randn(1, 3, 40, 36, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hooks(model):
    return [(*module._forward_pre_hooks.values(), *module._forward_hooks.values()) for module in model.modules()]


def gradients_of_the_unsharded_model(mesh, way, rank):
    model, plain = Blocks().double(), Blocks().double()
    run = sharded(model, way, mesh, ({}, {"reshard_after_forward": True}), tile=24, verify=False)
    before = hooks(run)
    for _ in range(2):
        replicas = [copy.deepcopy(plain) for _ in range(2)]
        outputs = [replica(image(seed)) for seed, replica in enumerate(replicas)]
        found = run(image(rank))
        torch.testing.assert_close(found, outputs[rank], rtol=1e-10, atol=1e-12)
        assert len(fxstream.inspect(run).plan.segments) > 0
        found.square().sum().backward()
        (sum(output.square().sum() for output in outputs) / 2).backward()
        weights = zip(*(replica.parameters() for replica in replicas), strict=True)
        for mine, theirs in zip(run.parameters(), weights, strict=True):
            total = sum(weight.grad for weight in theirs)
            torch.testing.assert_close(mine.grad.full_tensor(), total, rtol=1e-9, atol=1e-11)
        run.zero_grad()
    assert hooks(run) == before
    assert model.calls == 2
    return "equal"


def mixed_precision_of_the_sharded_model(mesh, way, rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    types = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    policies = [
        {"mp_policy": MixedPrecisionPolicy(**types, output_dtype=dtype)} for dtype in (torch.float32, None)
    ]
    model, plain = (Blocks(lambda channels: nn.GroupNorm(2, channels)) for _ in range(2))
    run, plain = sharded(model, way, mesh, policies, tile=24, verify=False), sharded(plain, way, mesh, policies)
    pixels = image(rank).float()
    found, wanted = run(pixels), plain(pixels)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    found.sum().backward(), wanted.sum().backward()
    for mine, theirs in zip(run.parameters(), plain.parameters(), strict=True):
        one, other = mine.grad.full_tensor(), theirs.grad.full_tensor()
        assert (one - other).norm() <= 0.05 * other.norm()
    return "equal"


def inference_of_the_sharded_model(mesh, way, rank):
    model, plain = Blocks().double().eval(), Blocks().double().eval()
    run = sharded(model, way, mesh, ({}, {"reshard_after_forward": True}), tile=24, verify=False)
    out = np.zeros((1, 2, 32, 28))
    fxstream.infer(run, image(rank), out=out)
    with torch.no_grad():
        np.testing.assert_allclose(out, plain(image(rank)), rtol=1e-10)
    assert type(run.head.weight).__name__ == "DTensor"
    if way != "whole":
        with pytest.raises(fxstream.CaptureError, match=r"is sharded.*plan and check the model before"):
            fxstream.plan(model, 64, tile=32)
    return "equal"


BODIES = (
    gradients_of_the_unsharded_model,
    mixed_precision_of_the_sharded_model,
    inference_of_the_sharded_model,
)


def _process(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for body in BODIES:
        for way in WAYS:
            try:
                results[f"{body.__name__}: {way}"] = body(mesh, way, rank)
            except Exception:
                results[f"{body.__name__}: {way}"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="session")
def results():
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_process, (folder,), nprocs=2)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", BODIES)
def test_sharded_models(results, body, way):
    for of_rank in results:
        assert of_rank[f"{body.__name__}: {way}"] == "equal"
