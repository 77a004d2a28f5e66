"""CPU seconds to make networks ready for the first image, and for each further image of another size.

Training steps within a memory (FCN needs twice of it), one thread; nothing is run, for images are stand-ins that
hold one element. Stages are seconds of the clock, so let nothing else run; tracing is the rest of the first call.
Medians over as many compiled modules as there are repeats.
"""

import argparse
import itertools
import random
import statistics
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxstream
from fxstream.io.inputs import inputs_of
from fxstream.machine.meter import measure
from fxstream.machine.units import parse_bytes
from fxstream.planning.plan import make_plan
from fxstream.tiling.request import Request
from fxstream.tools.benchmark import one_step
from fxstream.tools.zoo import build


class Block3d(nn.Sequential):
    """Two convolutions of a U-Net, each with an InstanceNorm."""

    def __init__(self, before: int, after: int) -> None:
        layers = []
        for channels in (before, after):
            layers += [nn.Conv3d(channels, after, 3, padding=1), nn.InstanceNorm3d(after, affine=True), nn.ReLU()]
        super().__init__(*layers)


class UNet3d(nn.Module):
    """A U-Net on volumes with one channel."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block3d(a, b) for a, b in itertools.pairwise((1, *widths))])
        self.up = nn.ModuleList([nn.ConvTranspose3d(b, a, 2, 2) for a, b in itertools.pairwise(widths)])
        self.joined = nn.ModuleList([Block3d(2 * a, a) for a in widths[:-1]])
        self.head = nn.Conv3d(widths[0], 4, 1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        skips = []
        for i, block in enumerate(self.down):
            volume = block(volume if i == 0 else nn.functional.max_pool3d(volume, 2))
            skips.append(volume)
        for i in reversed(range(len(self.up))):
            volume = self.joined[i](torch.cat([self.up[i](volume), skips[i]], 1))
        return self.head(volume)


def frozen(name: str) -> nn.Module:
    return fxstream.freeze_batch_norm(build(f"torchvision/{name}")).train()


PLANES = [(1, 3, 4096, 4096), (1, 3, 4160, 3968), (1, 3, 4000, 4300), (1, 3, 3801, 4211)]
VOLUMES = [(1, 1, 256, 256, 256), (1, 1, 248, 264, 272), (1, 1, 240, 240, 304), (1, 1, 264, 216, 280)]
NETWORKS = {
    "resnet50": ("ResNet-50, frozen", lambda: frozen("resnet50"), PLANES),
    "densenet121": ("DenseNet-121, frozen", lambda: frozen("densenet121"), PLANES),
    "statistics": ("ResNet-50, batch statistics", lambda: build("torchvision/resnet50").train(), PLANES),
    "efficientnet": ("EfficientNet-B0", lambda: build("torchvision/efficientnet_b0").train(), PLANES),
    "fcn": ("FCN-ResNet-50", lambda: build("torchvision/fcn_resnet50", weights_backbone=None).train(), PLANES),
    "unet": ("U-Net, 3-D, InstanceNorm", lambda: UNet3d().train(), VOLUMES),
    "convnext": ("ConvNeXt-T", lambda: build("torchvision/convnext_tiny").train(), PLANES),
}

STAGES = ("trace", "capture", "plan", "probe")


def calls(make, shapes, memory):
    """CPU seconds to prepare each shape with one compiled module, the last stages and the first ones' seconds."""
    model = make()
    module = fxstream.compile(model, memory=memory)
    seconds, prepared = [], []
    for shape in shapes:
        image = torch.zeros(1).expand(shape)
        start = time.process_time()
        prepared.append(fxstream.inspect(module).ready(inputs_of(model, (image,), {})).prepared)
        seconds.append(time.process_time() - start)
    return seconds, prepared


def of_stages(seconds, plan):
    """Seconds of each of `STAGES` of a first call that took so many; tracing is what is left."""
    of_plan = dict(plan.prepared)
    made = [of_plan["capture"] + of_plan["analysis"], of_plan["plan"], of_plan["probe"]]
    return [seconds - sum(of_plan.values()), *made]


def many(make, shape, memory, count):
    """Over `count` sizes with one compiled module: the largest share of the memory that a plan should take.

    And the largest time over that of a search for the size alone, and how many plans take over 1.05 of it.
    """
    model, draw = make(), random.Random(0)
    module = fxstream.compile(model, memory=memory, verify=False)
    shares, ratios = [], []
    for _ in range(count):
        extents = [8 * round(pixels / 8 * draw.uniform(0.5, 1.2)) for pixels in shape[2:]]
        image = torch.zeros(1).expand(*shape[:2], *extents)
        prepared = fxstream.inspect(module).ready(inputs_of(model, (image,), {})).prepared
        alone = make_plan(prepared.analysis.graph, Request(memory=memory))
        shares.append(prepared.plan.prediction.bytes / memory)
        ratios.append(prepared.plan.prediction.seconds / alone.prediction.seconds)
    return max(shares), max(ratios), sum(ratio > 1.05 for ratio in ratios)


def peaks(make, shape, share, count):
    """Over `count` sizes with one compiled module that run: predicted and measured peaks over the memory."""
    model, draw = make(), random.Random(0)
    shapes = [(*shape[:2], *(8 * round(n / 8 * draw.uniform(0.8, 1.1)) for n in shape[2:])) for _ in range(count)]
    memory = int(share * fxstream.plan(model, inputs=[shape], memory=2**40).prediction.plain_bytes)
    module = fxstream.compile(model, memory=memory, verify=False)
    ratios = []
    for of_call in shapes:
        images = [torch.randn(of_call)]
        one_step(module, model, images)
        measured = measure(lambda images=images: one_step(module, model, images)).peak_bytes
        ratios.append((module.plan.prediction.bytes / memory, measured / memory, len(module.plan.segments)))
    return memory, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=0, help="compare so many sizes with searches instead")
    parser.add_argument("--peaks", type=int, default=0, help="run so many sizes near --shape and measure instead")
    parser.add_argument(
        "--share", type=float, default=0.4, help="memory of --peaks, over that of the plain network"
    )
    parser.add_argument("--shape", type=int, nargs="+", help="one more shape, the last")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fxstream.StreamingWarning)
    torch.set_num_threads(1)
    fxstream.compile(nn.Conv2d(3, 4, 3), memory=options.memory)(torch.zeros(1, 3, 64, 64))  # loads what all need
    if options.many:
        table = Table("network", "largest share of the memory", "largest time over a search's", "above 1.05")
        for name in options.networks:
            title, make, shapes = NETWORKS[name]
            memory = (1 + (name == "fcn")) * parse_bytes(options.memory)
            share, ratio, above = many(make, shapes[0], memory, options.many)
            table.add_row(title, f"{share:.3f}", f"{ratio:.3f}", f"{above} of {options.many}")
        Console().print(table)
        return
    if options.peaks:
        table = Table("network", "memory", "predicted", "measured", "segments", title="peaks over the memory")
        for name in options.networks:
            title, make, shapes = NETWORKS[name]
            memory, ratios = peaks(make, tuple(options.shape or shapes[0]), options.share, options.peaks)
            columns = [*zip(*ratios)]
            listed = [", ".join(f"{one:.3f}" for one in column) for column in columns[:2]]
            table.add_row(title, f"{memory / 2**20:.0f} MiB", *listed, ", ".join(map(str, columns[2])))
        Console().print(table)
        return
    table = Table("network", "first call", *STAGES, "further sizes", "segments", "time")
    console = Console()
    for name in options.networks:
        title, make, shapes = NETWORKS[name]
        shapes = [*shapes, tuple(options.shape)] if options.shape else shapes
        memory = (1 + (name == "fcn")) * parse_bytes(options.memory)
        runs = [calls(make, shapes, memory) for _ in range(options.repeats)]
        medians = [statistics.median(of_call) for of_call in zip(*(seconds for seconds, _ in runs))]
        prepared = runs[-1][1]
        stages = [of_stages(seconds[0], prepared[0].plan) for seconds, prepared in runs]
        table.add_row(
            title,
            f"{medians[0]:.1f}",
            *(f"{statistics.median(column):.1f}" for column in zip(*stages)),
            ", ".join(f"{one:.2f}" for one in medians[1:]),
            str(len(prepared[0].plan.segments)),
            f"{prepared[0].plan.prediction.time_ratio:.2f}x",
        )
    console.print(table)
    console.print(f"torch {torch.__version__}, one thread, {options.memory}, medians of {options.repeats}")


if __name__ == "__main__":
    main()
