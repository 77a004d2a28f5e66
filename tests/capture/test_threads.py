"""Any number of threads may call compiled modules, at sizes that are known and at new ones."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstream


class Padded(nn.Module):
    """A model that reads sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        height, width = x.shape[2:]
        return self.b(F.relu(self.a(F.pad(x, (0, -width % 4, 0, -height % 4)))))[..., :height, :width]


MODELS = [
    lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)),
    Padded,
    lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(),
]
SIZES = [(20, 24), (33, 21), (26, 26), (41, 18), (22, 37)]


@pytest.mark.filterwarnings("ignore:.*bound to the size")
@pytest.mark.parametrize(
    ("threads", "calls", "sizes"), [(4, 5, 3), pytest.param(8, 50, 5, marks=pytest.mark.campaign)]
)
def test_calls_of_many_threads_are_exact(threads, calls, sizes):
    models = [build().double() for build in MODELS]
    modules = [fxstream.compile(model, tile=12, verify=False) for model in models]
    images = [torch.randn(1, 2, *size, dtype=torch.double) for size in SIZES[:sizes]]
    expected = [[_step(model, image) for image in images] for model in models]
    wrong, start = [], threading.Barrier(threads)

    def work(seed):
        start.wait()
        for i in range(calls * sizes):
            which, size = (seed + i) % len(models), (seed * 7 + i) % sizes
            try:
                found = _step(modules[which], images[size], list(models[which].parameters()))
                if not all(
                    torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected[which][size], strict=True)
                ):
                    wrong.append((which, size))
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    traces = [len(fxstream.inspect(module).calls) for module in modules]
    assert traces[0] == traces[2] == 1
    assert traces[1] <= sizes


def _step(module, image, parameters=None):
    """The output and the gradients of the weights, without touching those of other threads."""
    output = module(image)
    return output, *torch.autograd.grad(output.square().sum(), parameters or list(module.parameters()))
