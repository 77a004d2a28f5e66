"""Peak memory of a training step over the image size, plain and streamed, in fresh memory for each run.

The streamed part must not grow with the image beyond image, boundaries, output and their gradients, which are
printed beside it: the last column, what is left of the peak without them, stays flat.
"""

import argparse
import warnings

import torch
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.bench import measure
from fxstream.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--network", default="torchvision/resnet18")
parser.add_argument("--tile", type=int, default=768)
parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 1536, 2048, 3072])
parser.add_argument("--plain-up-to", type=int, default=2048, help="largest size at which the plain network runs")
options = parser.parse_args()
warnings.simplefilter("ignore", fxstream.StreamingWarning)
torch.manual_seed(0)

MIB = 2**20
model = fxstream.freeze_batch_norm(build(options.network))
streamed = fxstream.compile(model, tile=options.tile)
table = Table("image", "plain MiB", "streamed MiB", "boundaries, output MiB", "streamed, without them MiB")
for size in options.sizes:
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        streamed(image)
    peak = measure(lambda i=image: streamed(i).sum().backward()).peak_bytes
    model.zero_grad()
    kept = 0
    for module in streamed._last.streamed.children():
        kept += sum(torch.Size(shape).numel() * 4 for shape in module.stream.shapes)
    # at the peak one boundary's gradient is alive next to all boundaries
    largest = max(
        sum(torch.Size(s).numel() * 4 for s in module.stream.shapes)
        for module in streamed._last.streamed.children()
    )
    plain = "-"
    if size <= options.plain_up_to:
        plain = f"{measure(lambda i=image: model(i).sum().backward()).peak_bytes / MIB:.0f}"
        model.zero_grad()
    kept += largest
    table.add_row(str(size), plain, f"{peak / MIB:.0f}", f"{kept / MIB:.0f}", f"{(peak - kept) / MIB:.0f}")
console = Console()
console.print(table)
console.print(f"{options.network}, tile {options.tile}, float32, batch 1, torch {torch.__version__}")
