"""A second device in Python, so that what moves between devices is tested without one.

A tensor there wraps one of the host. Operators run on what is wrapped; one that is given tensors of both devices
raises, as on a real device, and so does none that moves or copies.
"""

import functools

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

NAME = "elsewhere"
MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Elsewhere(torch.Tensor):
    """A tensor on the second device."""

    @staticmethod
    def __new__(cls, inner):
        sizes = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), dtype=inner.dtype, device=torch.device(NAME, 0), **sizes
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        if func not in MOVES and any(not isinstance(t, cls) for t in here):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        inner_args, inner_kwargs = pytree.tree_map(on_host, (args, kwargs))
        result = func(*inner_args, **inner_kwargs)
        if torch.device(kwargs.get("device") or NAME).type == NAME:
            result = pytree.tree_map_only(torch.Tensor, cls, result)
        elif func is torch.ops.aten._to_copy.default:
            return result
        return return_and_correct_aliasing(func, args, kwargs, result)


def on_host(given):
    if isinstance(given, Elsewhere):
        return given.inner
    is_place = isinstance(given, (torch.device, str)) and str(given).split(":")[0] == NAME
    return torch.device("cpu") if is_place else given


@functools.cache
def elsewhere() -> torch.device:
    """The device, made known to torch at the first call."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    for name in ("empty.memory_format", "empty_strided"):
        made = functools.partial(_made, getattr(torch.ops.aten, name.split(".")[0]))
        torch.library.impl(f"aten::{name}", "PrivateUse1")(made)
    torch.library.impl("aten::_copy_from", "PrivateUse1")(_copied)
    return torch.device(NAME, 0)


def _copied(source, target, non_blocking=False):
    on_host(target).copy_(on_host(source))
    return target


def _made(factory, *args, **kwargs):
    return Elsewhere(factory(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": False}))
