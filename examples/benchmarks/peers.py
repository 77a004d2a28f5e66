"""lightstream beside fxstream: time, peak memory and error of one training step, over the plain network's.

    python -m pip install --no-deps lightstream==1.0.7
    python -m pip install lightning torchvision
    python examples/benchmarks/peers.py

Every way runs in processes of its own, by turns. The three convolutions are the paper's Table I network, where
fxstream has the tile of lightstream; elsewhere fxstream has the memory that lightstream was measured to take (half
of the plain network's where that fails).
BatchNorm is frozen, for lightstream knows nothing else, and its affine parameters too. lightstream calls CUDA
unconditionally: on a CPU these calls are replaced here. The error is that of the worst gradient of all parameters
to the plain network's in float64, over the largest value of that gradient; the plain network in float32 has one
too. The last setting has a size that is no multiple of the stride.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxstream
from fxstream.machine.meter import measure
from fxstream.machine.units import bytes_text
from fxstream.tools.zoo import build, define_missing_torchvision_schemas


@dataclass(frozen=True)
class Setting:
    """A network at one size, and the tile that lightstream gets."""

    network: str
    size: int
    tile: int


SETTINGS = (
    Setting("three convolutions", 1024, 518),
    Setting("three convolutions", 1024, 350),
    Setting("three convolutions", 1024, 265),
    Setting("resnet18", 2048, 1536),
    Setting("resnet50", 2048, 1536),
    Setting("resnet18", 1570, 1280),
)


@dataclass(frozen=True)
class Result:
    """Median seconds of a step, its peak, and the error of its gradients; or why it failed."""

    seconds: float = 0.0
    peak_bytes: int = 0
    error: float = 0.0
    failure: str = ""


def network(name: str) -> tuple[nn.Sequential, nn.Module]:
    """The layers to stream and the head behind them, with BatchNorm frozen."""
    torch.manual_seed(0)
    if name == "three convolutions":
        layers = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 3), (3, 64), (64, 3)))
        return nn.Sequential(*layers), nn.Identity()
    net = fxstream.freeze_batch_norm(build(f"torchvision/{name}"))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *stages), nn.Sequential(
        net.avgpool, nn.Flatten(), net.fc
    )


def lightstream_step(
    layers: nn.Sequential, head: nn.Module, image: torch.Tensor, tile: int
) -> Callable[[], nn.Module]:
    """A step by lightstream; it returns the module that has the gradients. Its CUDA calls are replaced."""
    define_missing_torchvision_schemas()
    torch.cuda.is_bf16_supported = lambda *_: False
    nn.Module.cuda = lambda self, device=None: self
    with contextlib.redirect_stdout(None):
        from lightstream.core.constructor import StreamingConstructor

        constructor = StreamingConstructor(
            layers, tile, verbose=False, normalize_on_gpu=False, add_keep_modules=[nn.BatchNorm2d]
        )
        streaming = constructor.prepare_streaming_model()
    streaming.device = torch.device("cpu")
    for module in streaming.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

    def step() -> nn.Module:
        both = nn.Sequential(streaming.stream_module, head)
        both.zero_grad()
        maps = streaming(image).requires_grad_()
        torch.set_grad_enabled(True)
        head(maps).sum().backward()
        with contextlib.redirect_stdout(None):
            streaming.backward(image, maps.grad)
        return both

    return step


def step_of(way: str, setting: Setting, memory: int) -> Callable[[], nn.Module]:
    """A training step in one way; it returns the module that has the gradients."""
    layers, head = network(setting.network)
    model = nn.Sequential(layers, head)
    image = torch.randn(1, 3, setting.size, setting.size)
    if way == "float64":
        model, image = model.double(), image.double()
    if way == "lightstream":
        return lightstream_step(layers, head, image, setting.tile)
    module: nn.Module = model
    if way == "fxstream" and setting.network == "three convolutions":
        module = fxstream.compile(model, tile=setting.tile, segments=1)
    elif way == "fxstream":
        module = fxstream.compile(model, memory=memory)

    def step() -> nn.Module:
        model.zero_grad()
        module(image).sum().backward()
        return model

    return step


def worker(task: dict) -> Result:
    """Measures one way in this process; the network in float64 leaves its gradients for the others."""
    warnings.simplefilter("ignore")
    step = step_of(task["way"], Setting(**task["setting"]), task["memory"])
    model = step()
    if task["way"] == "float64":
        torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, task["gradients"])
        return Result()
    peak = measure(step).peak_bytes
    seconds = []
    for _ in range(task["repeats"]):
        start = time.perf_counter()
        model = step()
        seconds.append(time.perf_counter() - start)
    expected, found = torch.load(task["gradients"]), dict(model.named_parameters())
    errors = [float((found[n].grad - e).abs().max() / e.abs().max()) for n, e in expected.items()]
    return Result(statistics.median(seconds), peak, max(errors))


def run(task: dict) -> Result:
    """The worker in a process of its own."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Result(failure=done.stderr.splitlines()[-1])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def compare(setting: Setting, repeats: int, folder: Path) -> dict[str, Result]:
    """All ways; float64 comes first, for its gradients, and fxstream last: it may take what lightstream took."""
    found: dict[str, Result] = {}
    for way in ("float64", "plain", "lightstream", "fxstream"):
        taken = found.get("lightstream", Result()).peak_bytes or found.get("plain", Result()).peak_bytes // 2
        memory = taken if way == "fxstream" else 0
        task = {"way": way, "setting": dataclasses.asdict(setting), "memory": memory, "repeats": repeats}
        found[way] = run(task | {"gradients": str(folder / "gradients.pt")})
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", help="only these of: three convolutions, resnet18, resnet50")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.task:
        print(json.dumps(dataclasses.asdict(worker(json.loads(options.task)))))
        return
    table = Table("network", "image", "tile", "way", "time", "memory", "error of gradients")
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            if options.networks and setting.network not in options.networks:
                continue
            found = compare(setting, options.repeats, Path(folder))
            plain = found["plain"]
            del found["float64"]
            for way, result in found.items():
                time_ratio, share = result.seconds / plain.seconds, result.peak_bytes / plain.peak_bytes
                first = (setting.network, str(setting.size), str(setting.tile)) if way == "plain" else ("",) * 3
                figures = (f"{time_ratio:.2f}x", f"{share:.2f}x", f"{result.error:.0e}")
                table.add_row(*first, way, *(("", "", result.failure) if result.failure else figures))
            table.add_section()
            print(f"{setting}: plain {plain.seconds:.2f} s, {bytes_text(plain.peak_bytes)}", file=sys.stderr)
    console = Console(width=100)
    console.print(table)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.repeats}")


if __name__ == "__main__":
    main()
