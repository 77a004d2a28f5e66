"""A causal video decoder (Wan, small widths) of 33 frames within a quarter of the plain peak: decode and gradient.

    pip install diffusers
    python examples/benchmarks/decoder.py

The decoder runs frame by frame with what it caches of earlier frames, unrolled into one graph of 4,500 operators.
Peaks are the bytes of all tensors. The first call captures, probes and plans, and makes the programs of the tiles.
"""

import argparse
import warnings

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fxstream
from fxstream.machine.meter import measure
from fxstream.machine.units import bytes_text
from fxstream.tools.zoo import define_missing_torchvision_schemas

CHANNELS, LATENT_FRAMES, SCALE = 4, 9, 8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--decode", type=int, default=768, help="pixels of a frame that is decoded")
parser.add_argument("--gradient", type=int, default=256, help="pixels of a frame whose gradient is computed")
parser.add_argument("--share", type=float, default=0.25, help="of the plain peak")
parser.add_argument("--latent-frames", type=int, default=LATENT_FRAMES, help="4 frames each, the first 1")
parser.add_argument("--repeats", type=int, default=2)
options = parser.parse_args()


class Decoder(torch.nn.Module):
    """The decoder of an autoencoder of diffusers; [N, 4, T, H, W] to [N, 3, 4T - 3, 8H, 8W]."""

    def __init__(self):
        super().__init__()
        define_missing_torchvision_schemas()
        from diffusers import AutoencoderKLWan

        torch.manual_seed(0)
        self.autoencoder = AutoencoderKLWan(
            base_dim=16, z_dim=CHANNELS, dim_mult=[1, 2, 2, 2], num_res_blocks=1
        ).eval()

    def forward(self, latents):
        return self.autoencoder.decode(latents).sample


def step(model, decoder, latents):
    """The frames of a decode; the gradients of the latents and of all weights."""
    if not latents.requires_grad:
        with torch.no_grad():
            return model(latents)
    inputs = [latents, *decoder.parameters()]
    gradients = torch.autograd.grad(model(latents).square().mean(), inputs, allow_unused=True)
    return torch.cat([one.flatten() for one in gradients if one is not None])


table = Table(
    f"of {4 * options.latent_frames - 3} frames",
    "plain",
    "peak",
    "streamed",
    "peak",
    "time",
    "predicted",
    "first call",
    "differ by",
)
warnings.simplefilter("ignore")
decoder = Decoder()
for what, pixels in (("decode", options.decode), ("gradient", options.gradient)):
    shape = (1, CHANNELS, options.latent_frames, pixels // SCALE, pixels // SCALE)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(what == "gradient")
    once = measure(lambda x=latents: step(decoder, decoder, x))
    module = fxstream.compile(decoder, memory=int(options.share * once.peak_bytes))
    first = measure(lambda m=module, x=latents: step(m, decoder, x))
    error = (first.result - once.result).abs().max() / once.result.abs().max()
    runs = [], []
    for _ in track(range(options.repeats), what, transient=True):
        for model, of_model in zip((decoder, module), runs, strict=True):
            run = measure(lambda m=model, x=latents: step(m, decoder, x))
            of_model.append((run.seconds, run.peak_bytes))
    (plain_seconds, plain_peak), (seconds, peak) = map(min, runs)
    table.add_row(
        f"{what} of {pixels} x {pixels}",
        f"{plain_seconds:.1f} s",
        bytes_text(plain_peak),
        f"{seconds:.1f} s",
        f"{bytes_text(peak)}, {peak / plain_peak:.0%}",
        f"{seconds / plain_seconds:.2f}x",
        f"{module.plan.prediction.time_ratio:.2f}x",
        f"{first.seconds:.0f} s",
        f"{error:.0e}",
    )
console = Console(width=110)
console.print(table)
console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, the fastest of {options.repeats}")
