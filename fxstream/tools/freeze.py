"""Functions that change a model, each an explicit call."""

from __future__ import annotations

import functools

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxstream.errors import InputError

__all__ = ["freeze_batch_norm"]


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Make every BatchNorm of `model` use its running statistics, also in training; returns the model.

    The statistics are no longer updated; scale and shift stay trainable. Running statistics make a BatchNorm
    local, so that the layers after it can be streamed without another sweep. The model is changed in place, and a
    copy or pickle of it stays frozen. Raises `InputError` where a BatchNorm has no running statistics.

    >>> model = freeze_batch_norm(nn.Sequential(nn.BatchNorm2d(3))).train()
    >>> model.training, model[0].training
    (True, False)
    """
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is None:
                raise InputError(f"`{path}` keeps no running statistics (track_running_stats=False)")
            module.train = functools.partial(_train_frozen, module)  # type: ignore[assignment]
            module.train(module.training)
    return model


def _train_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a frozen BatchNorm: its children (an activation, say) follow the mode, it does not."""
    if not isinstance(mode, bool):
        raise ValueError("training mode is expected to be boolean")
    for child in module.children():
        child.train(mode)
    module.training = False
    return module
