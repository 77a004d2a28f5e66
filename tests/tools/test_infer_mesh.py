"""One prediction by several processes: bit by bit that of one, resumed by any number, errors on all ranks."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxstream
from fxstream.io.sink import Sink

zarr = pytest.importorskip("zarr")
pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.xdist_group("sharing"),
]
SIZE, TILE = (210, 190), 60


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()


class Both(nn.Module):
    """A map, and a vector of the whole map."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, image):
        scores = self.layers(image)
        return {"map": scores, "mean": scores.mean((2, 3))}


def image():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def made(folder, name="scores", chunks=(1, 3, 48, 70), shape=(1, 4, *SIZE), **options):
    """An array whose chunks fit no tile."""
    return zarr.create_array(
        f"{folder}/{name}", shape=shape, chunks=chunks, dtype="f4", fill_value=np.nan, **options
    )


def wanted(model=None):
    module = fxstream.compile(model or network(), tile=TILE, segments=1, verify=False)
    with torch.no_grad():
        return module(image())


def compiled(count, model=None):
    mesh = init_device_mesh("cpu", (count,))
    return fxstream.compile(model or network(), tile=TILE, segments=1, verify=False, mesh=mesh)


def _process(rank, count, bodies, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    results = {}
    for body in bodies:
        try:
            results[body.__name__] = body(rank, count, folder)
        except Exception as error:
            results[body.__name__] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # gloo's threads abort now and then while the interpreter is torn down


def run(bodies, count, folder):
    """By the name of each function: what it returns on each of `count` processes, or the text of its error."""
    processes.spawn(_process, (count, bodies, str(folder)), nprocs=count)
    results = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]
    return {body.__name__: [of_rank[body.__name__] for of_rank in results] for body in bodies}


def scores_of(rank, count, folder):
    out = zarr.open(f"{folder}/scores", mode="r+")
    module = compiled(count)
    written = []
    write = Sink.write
    Sink.write = lambda sink, box, values: (written.append(str(box)), write(sink, box, values))
    assert fxstream.infer(module, image(), out=out, journal=f"{folder}/journal") is out
    return len(written)


@pytest.mark.parametrize("count, shards", [(4, None), (2, (1, 3, 96, 140))])
def test_ranks_write_one_array(count, shards, tmp_path):
    made(tmp_path, shards=shards)
    written = run([scores_of], count, tmp_path)["scores_of"]
    array = zarr.open(f"{tmp_path}/scores")[:]
    assert torch.equal(torch.from_numpy(array), wanted())
    assert max(written) - min(written) <= 1
    assert len(list(tmp_path.glob("journal*"))) == count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = fxstream.compile(network(), tile=50, segments=1, verify=False)  # another number, other tiles
        before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "scores").rglob("c/*"))]
        fxstream.infer(module, image(), out=zarr.open(f"{tmp_path}/scores"), journal=tmp_path / "journal")
    assert [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "scores").rglob("c/*"))] == before


def both(rank, count, folder):
    out = {"map": zarr.open(f"{folder}/scores"), "mean": None}
    mean = zarr.open(f"{folder}/mean")
    module = compiled(count, Both())
    first = fxstream.infer(module, image(), out=out)["mean"]
    fxstream.infer(module, image(), out={"map": None, "mean": mean})
    return first.tolist()


def in_memory(rank, count, folder):
    fxstream.infer(compiled(count), image(), out=np.zeros((1, 4, *SIZE), "f4"))


def of_other_weights(rank, count, folder):
    model = network()
    with torch.no_grad():
        model[0].weight += rank
    fxstream.infer(compiled(count, model), image(), out=zarr.open(f"{folder}/scores"), journal=f"{folder}/journal")


def a_full_disk_on_one(rank, count, folder):
    out = zarr.open(f"{folder}/scores")
    if rank:
        Sink.write = lambda *_: (_ for _ in ()).throw(fxstream.StreamError("no space left"))
    fxstream.infer(compiled(count), image(), out=out, journal=f"{folder}/journal")


@pytest.fixture(scope="session")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    made(folder)
    made(folder, "mean", (1, 4), (1, 4))
    return folder, run([both, in_memory, of_other_weights, a_full_disk_on_one], 2, folder)


def test_what_is_returned_every_rank_has(of_two):
    folder, results = of_two
    first, second = results["both"]
    expected = wanted(Both())
    assert first == second
    torch.testing.assert_close(torch.tensor(first), expected["mean"])
    torch.testing.assert_close(torch.from_numpy(zarr.open(f"{folder}/mean")[:]), expected["mean"])
    assert torch.equal(torch.from_numpy(zarr.open(f"{folder}/scores")[:]), expected["map"])


@pytest.mark.parametrize(
    "body, first, second",
    [
        (in_memory, "InputError: out is in the memory of one process", "out is in the memory of one process"),
        (of_other_weights, "the ranks of the mesh differ in their prediction", "differ in their prediction"),
        (a_full_disk_on_one, "StreamError: rank 1 of the mesh failed: StreamError: no space", "no space left"),
    ],
)
def test_errors_are_told_on_all_ranks(of_two, body, first, second):
    texts = of_two[1][body.__name__]
    assert first in texts[0]
    assert second in texts[1]
