"""Train a ResNet-50 on a photograph of a retina, plain and streamed, and compare.

Both networks start from the same weights and take the same steps. Printed are the loss of each step, the
largest difference between their gradients relative to the largest gradient, and the peak memory and time of a
step, plain -> streamed.
"""

import argparse
import copy

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from skimage import data

import fxstream
from fxstream.machine.meter import measure
from fxstream.tools.zoo import build

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--size", type=int, default=1411, help="pixels of the image that are used, per side")
parser.add_argument("--memory", default="640MiB", help="what a step may allocate at its peak")
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--double", action="store_true", help="in float64, where the difference is 1e-13")
parser.add_argument("--network", default="torchvision/resnet50")
options = parser.parse_args()

torch.manual_seed(0)
photograph = torch.from_numpy(data.retina()[: options.size, : options.size].copy())
dtype = torch.float64 if options.double else torch.float32
image = photograph.permute(2, 0, 1)[None].to(dtype) / 255
target = torch.tensor([[0.7]], dtype=dtype)

plain = fxstream.freeze_batch_norm(build(options.network, num_classes=1, zero_init_residual=True)).to(dtype)
streamed = fxstream.compile(copy.deepcopy(plain), memory=options.memory)  # the one line


def train_step(model, optimiser):
    optimiser.zero_grad()
    loss = torch.nn.functional.mse_loss(model(image), target)
    loss.backward()
    return loss.item()


console = Console()
table = Table("step", "loss plain", "loss streamed", "gradients differ by", "GiB", "seconds")
with Progress(console=Console(stderr=True), transient=True) as progress:
    bar = progress.add_task("training", total=2 * options.steps + 1)
    streamed(image)  # captures the network and plans the tiles
    progress.advance(bar)
    optimisers = {model: torch.optim.SGD(model.parameters(), 1e-4) for model in (plain, streamed)}
    for number in range(options.steps):
        results = []
        for model, optimiser in optimisers.items():
            results.append(measure(lambda m=model, o=optimiser: train_step(m, o)))
            progress.advance(bar)
        pairs = zip(plain.parameters(), streamed.parameters(), strict=True)
        scale = max(p.grad.abs().max().item() for p in plain.parameters())
        difference = max((a.grad - b.grad).abs().max().item() for a, b in pairs) / scale
        for optimiser in optimisers.values():
            optimiser.step()
        a, b = results
        table.add_row(
            str(number + 1),
            f"{a.result:.6f}",
            f"{b.result:.6f}",
            f"{difference:.0e}",
            f"{a.peak_bytes / 2**30:.2f} -> {b.peak_bytes / 2**30:.2f}",
            f"{a.seconds:.1f} -> {b.seconds:.1f}",
        )

console.print(table)
console.print(str(streamed.plan), highlight=False)
