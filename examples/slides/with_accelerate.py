"""Whole slides of different sizes with Hugging Face accelerate: an image per process, mixed precision, resume.

    accelerate launch examples/slides/with_accelerate.py labels.csv --spacing 4 --memory 10GiB

The same command again goes on from the last epoch. The CSV is that of `train.py`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from data import read_rows
from network import slide_network
from torch import nn
from torch.nn import functional as F
from views import FromBytes, SlideSources, loader_of

import fxstream


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", help="the CSV")
    parser.add_argument("--folder", type=Path, default=Path("run"), help="where the state is kept")
    parser.add_argument("--spacing", type=float, default=8.0, help="micrometres per pixel")
    parser.add_argument("--width", type=int, default=32, help="channels of the first layers")
    parser.add_argument("--memory", help="what a step may allocate, such as 8GiB")
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--accumulate", type=int, default=4, help="images per process in a step of the optimiser")
    parser.add_argument("--epochs", type=int, default=20)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """Train as the command line says; returns the compiled network."""
    options = options_of(arguments)
    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate)
    torch.manual_seed(0)
    network = FromBytes(slide_network(22, width=options.width, dropout=0, norm=False))
    compiled = fxstream.compile(network.to(accelerator.device), memory=options.memory)  # the one line
    rows = [row for row in read_rows(options.labels) if row.split == "train"]
    images = SlideSources(rows, options.spacing, train=True)
    parts = compiled, torch.optim.Adam(compiled.parameters(), 1e-3), loader_of(images)
    model, optimiser, loader = accelerator.prepare(*parts)
    epoch = Path(options.folder / "epoch")
    first = int(epoch.read_text()) if epoch.exists() else 0
    if first:
        accelerator.load_state(options.folder / str(first))
    for images.epoch in range(first, options.epochs):
        loader.set_epoch(images.epoch)
        for image, label in loader:
            with accelerator.accumulate(model):
                loss = F.huber_loss(model(image)[:, 0], label.to(accelerator.device, torch.float32))
                accelerator.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
        accelerator.save_state(options.folder / str(images.epoch + 1))
        if accelerator.is_main_process:
            epoch.write_text(str(images.epoch + 1))
        accelerator.print(f"epoch {images.epoch + 1}: last loss {loss.item():.4f}")
    accelerator.end_training()
    return compiled


if __name__ == "__main__":
    main()
