"""Segment the vessels of a retina with a U-Net, on an image whose plain training step would not fit.

The photograph of scikit-image is split: the network learns on its upper half and is judged on the lower one. The
vessels to be found are those of a ridge filter. The loss is part of the module: cross entropy plus Dice, which is
of the whole image and no sum over crops. After streamed LSUV initialisation and a minute on crops, the network
trains on one image mirrored to `--size` and then predicts another, both within `--memory`; with --picture FILE
that prediction is drawn. A small setting: --size 1024 --memory 48MiB --steps 40.
"""

import argparse
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from skimage import data, filters, morphology
from torch import nn

import fxstream
from fxstream.machine.meter import measure
from fxstream.machine.units import bytes_text
from fxstream.tools.check import relative_error, step

console = Console(highlight=False, soft_wrap=True)
BLUE, RED = (40, 90, 255), (230, 40, 30)


class UNet(nn.Module):
    """Three resolutions, no normalisation; extents must be multiples of four."""

    def __init__(self, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.fine = block(channels, width)
        self.middle = block(width, 2 * width)
        self.coarse = block(2 * width, 4 * width)
        self.up_to_middle = block(6 * width, 2 * width)
        self.up_to_fine = block(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        fine = self.fine(image)
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.up_to_middle(torch.cat([middle, F.interpolate(coarse, scale_factor=2.0)], 1))
        return self.head(self.up_to_fine(torch.cat([fine, F.interpolate(middle, scale_factor=2.0)], 1)))


def block(given: int, made: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(given, made, 3, padding=1), nn.ReLU(), nn.Conv2d(made, made, 3, padding=1), nn.ReLU()
    )


class Segmenter(nn.Module):
    """Takes an image of bytes; returns where vessels are, or with a target its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("weight", torch.tensor(3.0))

    def forward(self, image: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.network(image.to(self.network.head.weight.dtype) / 64 - 2)
        if target is None:
            return logits > 0
        target = target.to(logits.dtype)
        found = logits.sigmoid()
        dice = (2 * (found * target).sum() + 1) / (found.sum() + target.sum() + 1)
        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=self.weight) + 1 - dice


def vessels_of(photograph: np.ndarray) -> np.ndarray:
    """Dark ridges of the green channel, away from the border of the eye."""
    green = filters.gaussian(photograph[..., 1] / 255, 1)
    eye = filters.gaussian(photograph.max(2) / 255, 5) > 0.06
    ridges = filters.sato(green, sigmas=(2, 3, 5)) * morphology.isotropic_erosion(eye, 25)
    strong = np.percentile(ridges[eye], (87, 94.5))
    return morphology.area_opening(filters.apply_hysteresis_threshold(ridges, *strong), 401)


def mirrored(array: np.ndarray, size: int) -> np.ndarray:
    """The array continued by its mirror images, or cropped, to size x size."""
    missing = [(0, max(0, size - extent)) for extent in array.shape[:2]]
    return np.pad(array, missing + [(0, 0)] * (array.ndim - 2), mode="symmetric")[:size, :size]


def tensors(photograph: np.ndarray, vessels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """An image [1, 3, H, W] of bytes, and where its vessels are, [1, 1, H, W]."""
    return torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None], torch.from_numpy(vessels.copy())[None, None]


def crops(image: torch.Tensor, target: torch.Tensor, size: int, count: int, seed: int = 0):
    """Random pairs of an image and a target, turned and mirrored."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        top, left = (int(draw.integers(extent - size + 1)) for extent in image.shape[2:])
        pair = [tensor[..., top : top + size, left : left + size] for tensor in (image, target)]
        turns, flips = int(draw.integers(4)), [3] * int(draw.integers(2))
        yield tuple(tensor.rot90(turns, (2, 3)).flip(flips).contiguous() for tensor in pair)


def train_step(module: nn.Module, optimiser: torch.optim.Optimizer, *pair: torch.Tensor) -> float:
    optimiser.zero_grad()
    loss = module(*pair)
    loss.backward()
    optimiser.step()
    return loss.item()


def dice(found: torch.Tensor, target: torch.Tensor) -> float:
    """Twice what both have over the sum of what each has."""
    return (2 * (found & target).sum() / (found.sum() + target.sum()).clamp(min=1)).item()


def difference_to_plain(model: nn.Module, memory: str | int, *pair: torch.Tensor) -> float:
    """The largest relative difference of loss and gradients to the plain ones, in float64, within a memory."""
    plain = copy.deepcopy(model).double()
    streamed = fxstream.compile(copy.deepcopy(plain), memory=memory)
    found, wanted = step(streamed, streamed.model, pair), step(plain, plain, pair)
    assert not streamed.plan.is_trivial
    return max(relative_error(found[name], wanted[name]) for name in wanted)


def draw(path: str, photograph: np.ndarray, vessels: np.ndarray, found: np.ndarray, size: int) -> None:
    """Image, target and prediction of one half eye, and where they differ."""
    differ = np.full(photograph.shape, 255, np.uint8)
    for where, colour in ((found & vessels, (60, 60, 60)), (vessels & ~found, BLUE), (found & ~vessels, RED)):
        differ[where] = colour
    panels = {
        "image": photograph,
        "target: ridge filter": ~vessels,
        "prediction": ~found,
        "both (grey), missed (blue), extra (red)": differ,
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.6), layout="constrained")
    for axis, (title, picture) in zip(axes.flat, panels.items(), strict=True):
        axis.imshow(picture, cmap="gray", interpolation="antialiased")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(f"a part of the held-out image of {size} x {size} pixels, predicted in one piece", fontsize=10)
    figure.savefig(path, dpi=72)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="pixels of the large image, per side")
    parser.add_argument("--memory", default="512MiB", help="what a step may allocate at its peak")
    parser.add_argument("--steps", type=int, default=240, help="steps on crops")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--large-steps", type=int, default=2)
    parser.add_argument("--picture", metavar="FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    photograph = data.retina()
    vessels, half = vessels_of(photograph), len(photograph) // 2
    pair = tensors(photograph[:half], vessels[:half])

    model = Segmenter(UNet())
    fxstream.lsuv_(
        model,
        [image for image, _ in crops(*pair, options.crop, 4)],
        center=True,
        memory=options.memory,
        verify=False,
    )
    small = next(crops(*pair, 192, 1))
    difference = difference_to_plain(model, "12MiB", *small)
    console.print(f"192 x 192 in float64, within 12 MiB: loss and gradients differ from plain by {difference:.0e}")

    streamed = fxstream.compile(model, memory=options.memory)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps, eta_min=5e-4)
    steps = track(crops(*pair, options.crop, options.steps), "training", options.steps, transient=True)
    losses = []
    for crop in steps:
        losses.append(train_step(streamed, optimiser, *crop))
        schedule.step()
    few = max(1, len(losses) // 10)
    first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
    console.print(f"{len(losses)} steps on crops of {options.crop}: loss {first:.3f} -> {last:.3f}")

    large = tensors(*(mirrored(array[:half], options.size) for array in (photograph, vessels)))
    for _ in range(options.large_steps):
        measured = measure(lambda: train_step(streamed, optimiser, *large))
        prediction = streamed.plan.prediction
        console.print(
            f"{options.size} x {options.size}: loss {measured.result:.3f}, {measured.seconds:.0f} s, peak"
            f" {bytes_text(measured.peak_bytes)}, predicted {bytes_text(prediction.bytes)},"
            f" plain {bytes_text(prediction.plain_bytes)}"
        )
    console.print(str(streamed.plan))

    image, target = tensors(*(mirrored(array[half:], options.size) for array in (photograph, vessels)))
    with torch.no_grad():
        measured = measure(lambda: streamed(image))
    score, peak = dice(measured.result, target), bytes_text(measured.peak_bytes)
    console.print(
        f"prediction of the held-out half, so mirrored: Dice {score:.3f}, {measured.seconds:.0f} s, peak {peak}"
    )
    if options.picture:
        shown = [tensor[0, 0, :700, :1400].numpy() for tensor in (target, measured.result)]
        draw(options.picture, image[0, :, :700, :1400].permute(1, 2, 0).numpy(), *shown, options.size)


if __name__ == "__main__":
    main()
