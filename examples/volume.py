"""Train a 3-D U-Net with InstanceNorm on a volume whose plain training step would take many times the memory.

The volume is synthetic: blobs of scikit-image, blurred and drowned in noise, to be found again. InstanceNorm takes
its statistics over the whole volume and Dice is a sum over it: both are streamed, so that the network sees one
volume and no patches. Printed are how far a streamed step is from the plain one on a small volume, predicted and
measured memory, the loss, and Dice on a volume that the network has not seen, beside that of a threshold of the
smoothed volume; with --plot FILE its middle slice is drawn. A small setting: --size 48 --memory 24MiB --steps 8.
"""

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from skimage import data, filters
from torch import nn

import fxstream
from fxstream.machine.meter import measure
from fxstream.machine.units import bytes_text
from fxstream.tools.check import least_norms, relative_error, step

console = Console(highlight=False, soft_wrap=True)


class UNet3d(nn.Module):
    """Three resolutions; extents must be multiples of four. Returns logits, or with a target its loss."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fine = block(1, width)
        self.middle = block(width, 2 * width)
        self.coarse = block(2 * width, 4 * width)
        self.to_middle = nn.ConvTranspose3d(4 * width, 2 * width, 2, 2)
        self.up_to_middle = block(4 * width, 2 * width)
        self.to_fine = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.up_to_fine = block(2 * width, width)
        self.head = nn.Conv3d(width, 1, 1)

    def forward(self, volume: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        fine = self.fine(volume)
        middle = self.middle(F.max_pool3d(fine, 2))
        coarse = self.coarse(F.max_pool3d(middle, 2))
        middle = self.up_to_middle(torch.cat([middle, self.to_middle(coarse)], 1))
        logits = self.head(self.up_to_fine(torch.cat([fine, self.to_fine(middle)], 1)))
        return logits if target is None else loss_of(logits, target.to(logits.dtype))


def block(given: int, made: int) -> nn.Module:
    layers = []
    for channels in (given, made):
        layers += [
            nn.Conv3d(channels, made, 3, padding=1),
            nn.InstanceNorm3d(made, affine=True),
            nn.LeakyReLU(0.1),
        ]
    return nn.Sequential(*layers)


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy and Dice of the whole volume."""
    found = logits.sigmoid()
    dice = (2 * (found * target).sum() + 1) / (found.sum() + target.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + 1 - dice


def volume_of(size: int, seed: int, noise: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy volume [1, 1, size, size, size], and where its blobs are."""
    blobs = data.binary_blobs(size, 10 / size, 3, 0.25, rng=seed)
    noisy = filters.gaussian(blobs.astype(np.float32), 1) + np.random.default_rng(seed).normal(
        0, noise, blobs.shape
    )
    return torch.from_numpy(noisy).float()[None, None], torch.from_numpy(blobs)[None, None]


def dice(found: torch.Tensor, target: torch.Tensor) -> float:
    """Twice what both have over the sum of what each has."""
    return (2 * (found & target).sum() / (found.sum() + target.sum()).clamp(min=1)).item()


def thresholded(volume: torch.Tensor) -> torch.Tensor:
    """Otsu's threshold of the smoothed volume."""
    smooth = filters.gaussian(volume[0, 0].numpy(), 2)
    return torch.from_numpy(smooth > filters.threshold_otsu(smooth))[None, None]


def draw(path: str, volume: torch.Tensor, masks: dict[str, torch.Tensor]) -> None:
    """The middle slice of a volume and of masks of it."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(1, 1 + len(masks)), {"volume": volume, **masks}.items()):
        axes.imshow(shown[0, 0, shown.shape[2] // 2], cmap="gray")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=100)


def difference_to_plain(model: nn.Module, memory: str, *pair: torch.Tensor) -> float:
    """The largest relative difference of loss and gradients to the plain ones, in float64, within a memory.

    The biases in front of an InstanceNorm have no gradient but rounding and are measured on the largest of all.
    """
    plain, pair = copy.deepcopy(model).double(), (pair[0].double(), pair[1])
    streamed = fxstream.compile(copy.deepcopy(plain), memory=memory)
    found, wanted = step(streamed, streamed.model, pair), step(plain, plain, pair)
    assert not streamed.plan.is_trivial
    least = least_norms(wanted)
    return max(relative_error(found[name], wanted[name], least[name]) for name in wanted)


def train_step(module: nn.Module, optimiser: torch.optim.Optimizer, *pair: torch.Tensor) -> float:
    optimiser.zero_grad()
    loss = module(*pair)
    loss.backward()
    optimiser.step()
    return loss.item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96, help="voxels of the volume, per side")
    parser.add_argument("--memory", default="160MiB", help="what a step may allocate at its peak")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--plot", metavar="FILE", help="where the picture is written")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = UNet3d(options.width)
    difference = difference_to_plain(model, "12MiB", *volume_of(32, 2))
    console.print(
        f"32 x 32 x 32 in float64, within 12 MiB: loss and gradients differ from plain by {difference:.0e}"
    )

    streamed = fxstream.compile(model, memory=options.memory)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    pair = volume_of(options.size, 0)
    for number in range(options.steps):
        measured = measure(lambda: train_step(streamed, optimiser, *pair))
        peak = bytes_text(measured.peak_bytes)
        console.print(f"step {number + 1}: loss {measured.result:.4f}, {measured.seconds:.1f} s, peak {peak}")
    console.print(str(streamed.plan))

    volume, target = volume_of(options.size, 1)
    with torch.no_grad():
        measured = measure(lambda: streamed(volume) > 0)
    masks = {"network": measured.result, "threshold": thresholded(volume)}
    found, simple = (dice(mask, target) for mask in masks.values())
    console.print(f"held-out volume: Dice {found:.3f}, of a threshold {simple:.3f}; {measured.seconds:.1f} s")
    if options.plot:
        titles = {f"{name}: Dice {dice(mask, target):.2f}": mask for name, mask in masks.items()}
        draw(options.plot, volume, {"blobs": target, **titles})


if __name__ == "__main__":
    main()
