"""On a CUDA device: ResNet-50 and DenseNet-121 with bfloat16 autocast, in both memory formats.

Plain where it fits, streamed within budgets, eager and with compiled tiles, with boundaries on the device and in
host memory. Time is over the plain network's in the same format where that fits; memory is the peak of the
allocator. A second table has the time of a tile's forward and backward replayed as a CUDA graph, over the same
launched one by one. The paper's Table I network is in `table1.py --device cuda`. With `--lines` it is all that a
release must show (`lines.py`), in six minutes.
"""

import argparse
import collections
import contextlib
import itertools
import statistics
import warnings

import lines
import torch
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.io.inputs import inputs_of
from fxstream.machine.meter import measure
from fxstream.machine.units import bytes_text
from fxstream.runtime.rewrite import StreamedSegment
from fxstream.tools.zoo import build

FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--networks", nargs="+", default=["resnet50", "densenet121"])
parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384])
parser.add_argument("--budgets", nargs="+", default=["8GiB", "16GiB", "32GiB"])
parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
parser.add_argument("--offload", action="store_true", help="also with offload=True, within the first budget")
parser.add_argument("--compiled", action="store_true", help="also with compile_tiles=True, within the last budget")
parser.add_argument("--graphs", type=int, nargs="+", metavar="TILE", help="only the table of CUDA graphs")
parser.add_argument("--device", default="cuda", help="cpu, with small --sizes, only shows that the script runs")
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--lines", action="store_true", help="only what a release must show")
parser.add_argument("--scale", type=float, default=1.0, help="of the sizes of --lines")
parser.add_argument("--seconds", type=float, default=360.0, help="that --lines may take")
parser.add_argument("--cases", nargs="+", default=[], help="of --lines, by name")
options = parser.parse_args()
warnings.simplefilter("ignore", fxstream.StreamingWarning)
device = torch.device(options.device)
torch.manual_seed(0)
console = Console()


def seconds(step):
    """Median seconds of a step."""
    return statistics.median(measure(step, device).seconds for _ in range(options.repeats))


def run(module, model, image):
    """Median seconds and peak bytes of a step; None where memory is not enough."""

    def step():
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            output = module(image).float()
        output.backward(torch.ones_like(output))

    with contextlib.suppress(torch.OutOfMemoryError):
        step()
        model.zero_grad()
        peak = measure(step, device).peak_bytes
        return seconds(step), peak
    model.zero_grad()
    torch.cuda.empty_cache()  # only now: the error held what it had been given
    return None


def compare(name, size, layout):
    """The rows of one network at one size in one memory format."""
    title = f"{name}, {size} pixels, {layout}"
    table = Table("way", "seconds", "time", "predicted", "peak", "predicted", title=title)
    model = fxstream.freeze_batch_norm(build(f"torchvision/{name}")).train()
    model = model.to(device, memory_format=FORMATS[layout])
    image = torch.randn(1, 3, size, size, device=device).contiguous(memory_format=FORMATS[layout])
    plain = run(model, model, image)
    ways = [(budget, {"memory": budget}) for budget in options.budgets]
    first, last = ways[0], ways[-1]
    if options.offload:
        ways.append((f"{first[0]}, offload", {**first[1], "offload": True}))
    if options.compiled:
        ways.append((f"{last[0]}, compiled", {**last[1], "compile_tiles": True}))
    for label, arguments in [("plain", None), *ways]:
        module = model if arguments is None else fxstream.compile(model, **arguments)
        found = plain if arguments is None else run(module, model, image)
        if found is None:
            table.add_row(label, "none left")
            continue
        ratio = f"{found[0] / plain[0]:.2f}x" if plain else ""
        predicted = module.plan.prediction if arguments is not None else None
        told = (f"{predicted.time_ratio:.2f}x", bytes_text(predicted.bytes)) if predicted else ("", "")
        table.add_row(label, f"{found[0]:.3f}", ratio, told[0], bytes_text(found[1]), told[1])
    console.print(table)


def arguments_of(stream, task, inputs):
    """What the tile program of a task is given: its boxes of the spatial inputs, whole inputs, parts of tables."""
    boxes = [image[box] for image, box in zip(inputs, task.reads, strict=False)]
    tiles = [box.detach().clone().requires_grad_() for box in boxes]
    whole = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs[len(boxes) :]]
    return [*tiles, *whole, *(tensor for lookup in task.lookups for tensor in lookup.tensors(device))]


def tile_step(program, given):
    """Forward and backward of one tile."""
    wanted = [t for t in given if t.requires_grad]

    def step():
        results = [r for r in program(*given) if r is not None and r.requires_grad]
        torch.autograd.grad(results, wanted, [torch.ones_like(r) for r in results], allow_unused=True)

    return step


def graphed(program, given):
    """The program with its forward and backward as CUDA graphs."""
    if device.type == "cpu":
        return program
    return torch.cuda.make_graphed_callables(program, tuple(given), allow_unused_input=True)


def compare_graphs(name, model, tile):
    """The most frequent tile of every segment, launched and replayed."""
    module, size = fxstream.compile(model, tile=tile), 4 * tile
    seen = {}
    image = torch.randn(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    module(image)
    prepared = module._last
    segments = {n: m for n, m in prepared.streamed.named_modules() if isinstance(m, StreamedSegment)}
    for segment_name, segment in segments.items():
        segment.register_forward_pre_hook(lambda _, given, n=segment_name: seen.update({n: given}))
    with torch.no_grad():
        prepared.run(model, inputs_of(model, (image,), {}))
    for segment_name, segment in segments.items():
        stream = segment.stream
        tasks = stream.schedule.tasks
        most, _ = collections.Counter(task.program for task in tasks).most_common(1)[0]
        given = arguments_of(stream, next(task for task in tasks if task.program == most), seen[segment_name])
        program = stream.schedule.programs[most].run_again
        launched, replayed = tile_step(program, given), tile_step(graphed(program, given), given)
        launched(), replayed()
        box = "x".join(map(str, given[0].shape[2:]))
        ratio = seconds(replayed) / seconds(launched)
        graphs.add_row(name, str(tile), segment_name, box, f"{1000 * seconds(launched):.1f}", f"{ratio:.2f}x")


if options.lines:
    lines.main(device, options.scale, options.seconds, options.cases)
    raise SystemExit
if options.graphs:
    graphs = Table("network", "tile", "segment", "tile reads", "milliseconds", "as a graph")
    for name in options.networks:
        model = fxstream.freeze_batch_norm(build(f"torchvision/{name}")).train()
        for tile in options.graphs:
            compare_graphs(name, model.to(device, memory_format=torch.channels_last), tile)
    console.print(graphs)
else:
    for name, size, layout in itertools.product(options.networks, options.sizes, options.formats):
        compare(name, size, layout)
where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
console.print(f"{where}, torch {torch.__version__}, medians of {options.repeats}")
