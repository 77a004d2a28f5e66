"""Replays on the host, for tests: calls of operators, done again on the tensors that they were done on."""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}
"""Operators that wait for a device."""


class Calls(TorchDispatchMode):
    """The calls of operators inside the context, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class HostReplayer:
    """As `fxstream.machine.replay.Replayer`: a replay knows no Python but its calls, and no other tensors.

    What a function writes while it is made into a replay is not a number until the replay has run.
    """

    is_current = True
    made = runs = bytes = 0

    def replay_of(self, function):
        with Calls() as record:
            function()
        HostReplayer.made += 1
        for func, args, _, result in record.calls:
            for tensor in tensors(result):
                is_its_own = not func.is_view and all(tensor is not one for one in tensors(args))
                if tensor.is_floating_point() and (is_its_own or func._schema.name == "aten::copy_"):
                    tensor.detach().fill_(torch.nan)

        def run():
            HostReplayer.runs += 1
            for func, args, kwargs, result in record.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    if old is not new and not func.is_view:
                        old.detach().copy_(new)

        return run
