"""Tiles shared by the processes of a mesh: the gradients of one process, half the work each."""

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from small_networks import Function
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fxstream
from fxstream.rules import reductions
from fxstream.runtime.ranks import Ranks, assigned

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("sharing"),
]


def network(normalised=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)]
    layers += [nn.GroupNorm(2, 4)] if normalised else []
    layers += [nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double().train()


def image(seed=1):
    return torch.randn(2, 3, 61, 70, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compiled(model, **request):
    return fxstream.compile(model, verify=False, **request)


def step(module, model, x):
    x = x.clone().requires_grad_()
    output = module(x)
    output.square().sum().backward()
    tensors = {"output": output.detach(), "image": x.grad, **dict(model.named_buffers())}
    return tensors | {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def _process(rank, count, bodies, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    results = {}
    for body in bodies:
        try:
            results[body.__name__] = body(rank, count)
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            results[body.__name__] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


def run(bodies, count):
    """By the name of each body: what it returns on each of `count` processes, or the text of its error."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_process, (count, bodies, folder), nprocs=count)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]
        return {body.__name__: [results[body.__name__] for results in found] for body in bodies}


@pytest.fixture(scope="session")
def of_two():
    failing = (one_rank_fails, other_image, other_plan, other_size, no_plan_on_one_rank, draws_differently)
    return run((equal_to_one_process, shares_of_the_work, *failing), 2)


@pytest.fixture(scope="session")
def of_four():
    return run(
        (equal_to_one_process, more_ranks_than_tiles, with_replicas, with_sharded_parameters, rows, rows_in_place),
        4,
    )


def equal_to_one_process(rank, count):
    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("tiles",))
    for normalised in (True,) if count > 2 else (False, True):
        for request in ({"tile": 30, "segments": 1}, {"memory": "400KiB"})[: 1 if count > 2 else 2]:
            plain, model = network(normalised), network(normalised)
            module = compiled(model, mesh=mesh["tiles"], **request)
            wanted = step(plain, plain, image())
            assert_close(step(module, model, image()), wanted)
            assert not module.plan.is_trivial
            with torch.no_grad():
                torch.testing.assert_close(module(image(2)), plain(image(2)), rtol=1e-10, atol=1e-12)
    return "equal"


def test_gradients_are_those_of_one_process(of_two, of_four):
    assert of_two["equal_to_one_process"] == ["equal"] * 2
    assert of_four["equal_to_one_process"] == ["equal"] * 4


def more_ranks_than_tiles(rank, count):
    model, plain = network(), network()
    module = compiled(model, tile=60, segments=1, mesh=init_device_mesh("cpu", (count,)))
    x = image()[..., :40, :]
    assert_close(step(module, model, x), step(plain, plain, x))
    return max(segment.tile_count for segment in module.plan.segments)


def test_more_ranks_than_tiles(of_four):
    assert of_four["more_ranks_than_tiles"] == [2] * 4


def with_replicas(rank, count):
    """Two replicas by two ranks that share tiles: DDP averages over the replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tiles"))
    replica = mesh["replicas"].get_local_rank()
    model = fxstream.freeze_batch_norm(network())
    module = compiled(model, tile=30, segments=1, mesh=mesh["tiles"])
    replicated = nn.parallel.DistributedDataParallel(module, process_group=mesh["replicas"].get_group())
    replicated(image(replica)).square().sum().backward()
    plain = fxstream.freeze_batch_norm(network())
    for seed in (0, 1):
        (plain(image(seed)).square().sum() / 2).backward()
    for mine, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-10, atol=1e-12)
    return "equal"


def with_sharded_parameters(rank, count):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tiles"))
    replica = mesh["replicas"].get_local_rank()
    module = compiled(fxstream.freeze_batch_norm(network()), tile=30, segments=1, mesh=mesh["tiles"])
    fully_shard(module, mesh=mesh["replicas"])
    module(image(replica)).square().sum().backward()
    plain = fxstream.freeze_batch_norm(network())
    for seed in (0, 1):
        (plain(image(seed)).square().sum() / 2).backward()
    for mine, wanted in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), wanted.grad, rtol=1e-10, atol=1e-12)
    return "equal"


@pytest.mark.parametrize("body", ["with_replicas", "with_sharded_parameters"])
def test_composes_with_replicas(of_four, body):
    assert of_four[body] == ["equal"] * 4


def rows(rank, count):
    """All rows of all ranks, as this rank puts its own between those of the others."""
    ranks = Ranks(init_device_mesh("cpu", (count,)))
    mine = [torch.tensor([10.0 * rank + i]) for i in range(rank)]  # none of rank 0
    before, behind = ranks.gather_rows(mine, list(range(rank)))
    return [(row.item(), n) for row, n in (*before, *zip(mine, range(rank)), *behind)]


def test_rows_are_in_the_order_of_the_ranks(of_four):
    assert of_four["rows"] == [[[10.0 * rank + i, i] for rank in range(4) for i in range(rank)]] * 4


def rows_in_place(rank, count):
    """A sum that weighs each partial result by its place: forward and backward must have it at the same place."""

    def weighted(partials, counts):
        places = torch.arange(1, len(partials) + 1).view(-1, *[1] * (partials.ndim - 1))
        return (partials * places).sum(0)

    model = Function(lambda m, x: (x * 1).sum((2, 3)))
    x = torch.randint(-9, 9, (1, 2, 41, 37), generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    with mock.patch.object(reductions, "sums_of_tiles", weighted):
        module = compiled(model, tile=12, segments=1, mesh=init_device_mesh("cpu", (count,)))
        output = module(x)
        output.sum().backward()
    assert (x * x.grad).sum() == output.sum()
    tiles = module.plan.segments[0].tile_count
    return [tiles, *output.flatten().tolist(), x.grad.min().item(), x.grad.max().item()]


def test_forward_and_backward_combine_the_rows_of_all_ranks_in_one_order(of_four):
    first, *others = of_four["rows_in_place"]
    assert isinstance(first, list), first
    assert others == [first] * 3
    tiles, *_, least, largest = first
    assert (least, largest) == (1, tiles)


def one_rank_fails(rank, count):
    model = network()
    module = compiled(model, tile=30, segments=1, mesh=init_device_mesh("cpu", (count,)))
    module(image())
    if rank == 1:
        for streamed in fxstream.inspect(module).last.streamed.children():
            streamed.stream.schedule.programs[:] = []
    module(image())


def other_image(rank, count):
    module = compiled(network(), tile=30, mesh=init_device_mesh("cpu", (count,)))
    module(image(rank))


def other_plan(rank, count):
    module = compiled(network(), tile=30 + 4 * rank, mesh=init_device_mesh("cpu", (count,)))
    module(image())


def other_size(rank, count):
    module = compiled(network(), memory="1MiB", mesh=init_device_mesh("cpu", (count,)))
    module(image()[..., : 61 - rank, :])


def no_plan_on_one_rank(rank, count):
    module = compiled(network(), tile=30 if rank else 1, mesh=init_device_mesh("cpu", (count,)))
    module(image())


def draws_differently(rank, count):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 2, 3)).train().double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    module = compiled(model, tile=30, mesh=init_device_mesh("cpu", (count,)))
    torch.manual_seed(rank)
    module(image())


@pytest.mark.parametrize(
    "body, first, second",
    [
        ("one_rank_fails", "StreamError: rank 1 of the mesh failed: IndexError", "IndexError"),
        ("other_image", "StreamError: the ranks of the mesh differ in their image", "differ in their image"),
        ("other_plan", "differ in their plan: rank 0 has", "differ in their plan"),
        ("other_size", "differ in their image: rank 0 has [2, 3, 61, 70]", "rank 1 [2, 3, 60, 70]"),
        (
            "no_plan_on_one_rank",
            "PlanError: tile=1 is too small",
            "StreamError: rank 0 of the mesh failed: PlanError",
        ),
        ("draws_differently", "differ in their random state", "differ in their random state"),
    ],
)
def test_failures_are_told_on_all_ranks(of_two, body, first, second):
    found = of_two[body]
    assert first in found[0]
    assert second in found[1]


class Flops(TorchDispatchMode):
    """Floating-point operations by torch's own formulas. (Its counter refuses modules whose inputs are leaves.)"""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


def shares_of_the_work(rank, count):
    def flops(module):
        module(image()).sum().backward()
        with Flops() as counted:
            module(image()).sum().backward()
        return counted.total

    module = compiled(network(), memory="300KiB", mesh=init_device_mesh("cpu", (count,)))
    return flops(module) / flops(network())


def test_each_rank_does_half_of_the_work(of_two):
    first, second = of_two["shares_of_the_work"]
    assert 0.45 < first / (first + second) < 0.55
    assert 0.45 < first < 1.0  # of the plain network's, with recomputation


def dies(rank, count):
    module = compiled(network(), tile=30, segments=1, mesh=init_device_mesh("cpu", (count,)))
    module(image())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    module(image())


@pytest.mark.campaign
def test_a_killed_rank_is_told():
    with tempfile.TemporaryDirectory() as folder:
        started = processes.start_processes(_process, (2, (dies,), folder), nprocs=2, join=False)
        started.processes[0].join(120)
        assert not started.processes[0].is_alive()
        assert "a rank of the mesh is gone" in json.loads(Path(folder, "0.json").read_text())["dies"]


def test_a_mesh_of_two_dimensions_is_refused():
    class Mesh:
        ndim = 2

    with pytest.raises(fxstream.InputError, match="DeviceMesh of one dimension"):
        compiled(network(), mesh=Mesh())


def test_assignment_balances():
    costs = [5.0, 3.0, 3.0, 2.0, 2.0, 1.0]
    ranks = assigned(costs, 2)
    assert sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == 0) == 8.0


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_rank_has_more_than_one_tile_beyond_its_share(count):
    costs = [float(1 + (7 * i) % 11) for i in range(40)]
    ranks = assigned(costs, count)
    loads = [sum(cost for cost, owner in zip(costs, ranks, strict=True) if owner == rank) for rank in range(count)]
    assert len(ranks) == len(costs)
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / count + max(costs)
    assert set(ranks) == set(range(count))


def test_the_largest_tiles_come_first_and_of_equal_ranks_the_first():
    assert assigned([1.0, 9.0, 1.0, 1.0, 8.0], 2) == (1, 0, 0, 1, 1)
    assert assigned([], 3) == ()
    assert assigned([2.0, 2.0], 4) == (0, 1)
