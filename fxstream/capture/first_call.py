"""What a model does at its first call alone, which no graph can hold: it is done by a call without data."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxstream.graph.shapes import fake_tensor_log_silenced

__all__ = ["after_first_call"]

UNSUPPORTED_BLOCK = "Unsupported context manager"
"""How dynamo begins to say that code enters a lock."""


@contextlib.contextmanager
def after_first_call(model: nn.Module, call: Callable[[nn.Module], None], reason: str) -> Iterator[bool]:
    """What only a first call of the model does, by one without data; yields whether that has changed a module.

    Such is to install hooks under a lock, which no graph can hold: nothing is done where `reason`, that a trace
    has ended for, is another. All is as it was if the block raises, if the call does, and if a module keeps a
    tensor.
    """
    if UNSUPPORTED_BLOCK not in reason:
        yield False
        return
    before = [_State.of(module) for module in model.modules()]
    try:
        has_changed = _is_called(model, call) and not all(state.is_same for state in before)
        if not has_changed:
            _restore(before)
        yield has_changed
    except BaseException:
        _restore(before)
        raise


def _is_called(model: nn.Module, call: Callable[[nn.Module], None]) -> bool:
    """Whether a call goes well and leaves no tensor behind."""
    try:
        with fake_tensor_log_silenced():
            call(model)
    except Exception:  # whatever the model raises without data
        return False
    every = (vars(module) for module in model.modules())
    return not any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves([dict(one) for one in every]))


def _restore(states: Sequence[_State]) -> None:
    for state in states:
        state.restore()


@dataclass(frozen=True, slots=True)
class _State:
    """The attributes of a module, and what those that are collections have in them."""

    module: nn.Module
    attributes: dict[str, Any]
    contents: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        """That of now."""
        attributes = dict(vars(module))
        collections = {name: one for name, one in attributes.items() if isinstance(one, (dict, list, set))}
        return cls(module, attributes, {name: copy.copy(one) for name, one in collections.items()})

    @property
    def is_same(self) -> bool:
        """Whether the module has the same still."""
        now = vars(self.module)
        return now.keys() == self.attributes.keys() and all(
            now[name] is value and (name not in self.contents or _is_like(value, self.contents[name]))
            for name, value in self.attributes.items()
        )

    def restore(self) -> None:
        """Give the module what it had."""
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for name, content in self.contents.items():
            collection = self.attributes[name]
            collection.clear()
            (collection.extend if isinstance(collection, list) else collection.update)(content)


def _is_like(collection: Collection[Any], before: Collection[Any]) -> bool:
    """Whether a collection has the very things that it had."""
    if isinstance(collection, dict) and isinstance(before, dict):
        return collection.keys() == before.keys() and _is_like(collection.values(), before.values())
    return len(collection) == len(before) and all(a is b for a, b in zip(collection, before, strict=True))
