"""Whole slides of different sizes with Lightning: replicas of ranks that share tiles, mixed precision, resume.

    python examples/slides/with_lightning.py labels.csv --spacing 4 --memory 10GiB --devices 4 --tiles 2

Of four processes, two share the tiles of each image, and DDP averages over the two pairs. The processes of a pair
have the same gradient, so the average over all four is that over the pairs. The same command again goes on from
the last epoch. The CSV is that of `train.py`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from data import read_rows
from network import slide_network
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils.data import DataLoader
from views import FromBytes, SlideSources, loader_of

import fxstream
from fxstream.tools.zoo import define_missing_torchvision_schemas

define_missing_torchvision_schemas()  # for a torchvision without its compiled operators

import lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402


class SlideTask(lightning.LightningModule):
    """A number per slide."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options, self.model = options, None
        rows = read_rows(options.labels)
        self.images = SlideSources([row for row in rows if row.split == "train"], options.spacing, train=True)

    def configure_model(self) -> None:
        """Called when the processes know of each other; the compiled network is all that the module holds."""
        if self.model is not None:
            return
        torch.manual_seed(0)
        network = FromBytes(slide_network(22, width=self.options.width, dropout=0, norm=False))
        self.replicas, self.replica, mesh = 1, 0, None
        if distributed.is_initialized():
            shape = (distributed.get_world_size() // self.options.tiles, self.options.tiles)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "tiles"))
            self.replicas, self.replica = shape[0], mesh["replicas"].get_local_rank()
            mesh = mesh["tiles"] if self.options.tiles > 1 else None
        self.model = fxstream.compile(network, memory=self.options.memory, mesh=mesh)  # the one line

    def train_dataloader(self) -> DataLoader:
        return loader_of(self.images, self.replicas, self.replica)

    def on_train_epoch_start(self) -> None:
        self.images.epoch = self.current_epoch

    def training_step(self, batch: tuple[fxstream.Source, torch.Tensor], _: int) -> torch.Tensor:
        image, label = batch
        loss = F.huber_loss(self.model(image)[:, 0], label.to(torch.float32))
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=1, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), 1e-3)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", help="the CSV")
    parser.add_argument("--folder", type=Path, default=Path("run"), help="where the checkpoints are")
    parser.add_argument("--spacing", type=float, default=8.0, help="micrometres per pixel")
    parser.add_argument("--width", type=int, default=32, help="channels of the first layers")
    parser.add_argument("--memory", help="what a step may allocate, such as 8GiB")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--tiles", type=int, default=1, help="of these, how many share the tiles of one image")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--accumulate", type=int, default=4, help="images per replica in a step of the optimiser")
    parser.add_argument("--epochs", type=int, default=20)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """Train as the command line says; returns the compiled network."""
    options = options_of(arguments)
    task = SlideTask(options)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        use_distributed_sampler=False,
        precision=options.precision,
        accumulate_grad_batches=options.accumulate,
        callbacks=[ModelCheckpoint(options.folder, filename="{epoch}", save_last=True)],
        default_root_dir=options.folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = options.folder / "last.ckpt"
    trainer.fit(task, ckpt_path=last if last.exists() else None)
    if trainer.is_global_zero:
        print(f"epoch {trainer.current_epoch}: loss {trainer.callback_metrics['loss']:.4f}")
    return task.model


if __name__ == "__main__":
    main()
