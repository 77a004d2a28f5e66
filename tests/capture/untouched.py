"""Everything that a user has and a call of fxstream must leave as it was."""

import logging
import os
import random
import sys
import warnings

import numpy
import torch
from torch import nn


def _value(value):
    """A tensor by its identity, version and values, a container by what it holds, anything else as it is."""
    if isinstance(value, torch.Tensor):
        return (
            id(value),
            type(value),
            value._version,
            value.requires_grad,
            value.detach().clone(),
            _value(value.grad),
        )
    if isinstance(value, dict):
        return {"": id(value), **{str(key): _value(one) for key, one in value.items()}}
    if isinstance(value, (list, tuple)):
        return id(value), [_value(one) for one in value]
    return type(value), value


def _flags():
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (autocast, torch.is_autocast_cache_enabled()),
        "types": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.are_deterministic_algorithms_enabled(),
        ),
        "modes": modes,
        "threads": torch.get_num_threads(),
        "random": (torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()),
        "functions": (
            torch.autograd.Function.__dict__["apply"],
            *(nn.Module.__dict__[name] for name in ("__call__", "__getattr__", "__setattr__", "forward")),
            torch.nn.functional.conv2d,
            torch.Tensor.__add__,
        ),
        "dynamo": torch._dynamo.config.save_config_portable(),
        "questions": dict(torch._dynamo.variables.torch.tracing_state_functions()),
        "hooks": [len(hooks) for hooks in vars(torch.nn.modules.module).values() if isinstance(hooks, dict)],
        "saved": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "logging": (list(logging.getLogger("torch._subclasses.fake_tensor").filters), sys.stderr, sys.stdout),
        "warnings": list(warnings.filters),
        "files": sorted(os.listdir()),
    }


def snapshot(model, *arguments):
    """All of it: every attribute of every module, arguments, random states, flags, functions, files."""
    modules = {name: (id(module), type(module), _value(module.__dict__)) for name, module in model.named_modules()}
    return {"modules": modules, "arguments": [_value(one) for one in arguments], **_flags()}


def differences(before, after, path=""):
    """The paths at which two snapshots differ."""
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return [] if torch.equal(before, after) else [path]
    if isinstance(before, numpy.ndarray):
        return [] if (before == after).all() else [path]
    if isinstance(before, dict) and isinstance(after, dict):
        if list(before) != list(after):
            return [f"{path}: {sorted(map(str, set(before) ^ set(after)))}"]
        return [d for key in before for d in differences(before[key], after[key], f"{path}.{key}")]
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        if len(before) != len(after):
            return [f"{path}: {len(before)} and {len(after)}"]
        return [
            d
            for i, (a, b) in enumerate(zip(before, after, strict=True))
            for d in differences(a, b, f"{path}[{i}]")
        ]
    return [] if before is after or before == after else [path]
