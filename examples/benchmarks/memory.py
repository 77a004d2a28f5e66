"""Peak memory of a training step over the image size, plain and streamed.

The network is ResNet-18 up to its second stage, a global pool and a linear layer, so that the streamed part's
output is small. The streamed part must not grow with the image beyond its output and the output's gradient: the
last column, what is left of the peak without them, stays flat.
"""

import argparse
import warnings

import torch
from rich.console import Console
from rich.table import Table

import fxstream
from fxstream.machine.meter import measure
from fxstream.tools.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tile", type=int, default=768)
parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 3072, 4096])
parser.add_argument("--plain-up-to", type=int, default=2048, help="largest size at which the plain network runs")
options = parser.parse_args()
warnings.simplefilter("ignore", fxstream.StreamingWarning)
torch.manual_seed(0)

MIB = 2**20
model = fxstream.freeze_batch_norm(build("torchvision/resnet18"))
model.layer3, model.layer4, model.fc = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Linear(128, 10)
streamed = fxstream.compile(model, tile=options.tile, segments=1)
table = Table("image", "plain MiB", "streamed MiB", "output and gradient MiB", "tiles MiB")
for size in options.sizes:
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        streamed(image)
    peak = measure(lambda i=image: streamed(i).sum().backward()).peak_bytes
    model.zero_grad()
    kept = 2 * 4 * 128 * (size // 8) ** 2
    plain = "-"
    if size <= options.plain_up_to:
        plain = f"{measure(lambda i=image: model(i).sum().backward()).peak_bytes / MIB:.0f}"
        model.zero_grad()
    table.add_row(str(size), plain, f"{peak / MIB:.0f}", f"{kept / MIB:.0f}", f"{(peak - kept) / MIB:.0f}")
console = Console()
console.print(table)
console.print(f"tile {options.tile}, float32, batch 1, torch {torch.__version__}")
