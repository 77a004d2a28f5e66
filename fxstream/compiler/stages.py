"""The stages before the first tile runs: each is announced when it begins, and how long it took is kept.

A stage is a line of the logger "fxstream" at level INFO, and with `progress` a line on a terminal while it runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from fxstream.machine.progress import Bar

__all__ = ["Stages"]

logger = logging.getLogger("fxstream")


class Stages:
    """The stages of one call; `seconds` are those of each, in the order in which they began.

    >>> stages = Stages("ResNet", None)
    >>> with stages("capture"):
    ...     pass
    >>> list(dict(stages.seconds))
    ['capture']
    """

    def __init__(self, model: str, bar: Bar | None) -> None:
        self._model, self._bar = model, bar
        self._seconds: dict[str, float] = {}

    @property
    def seconds(self) -> tuple[tuple[str, float], ...]:
        """Each stage so far, and the seconds that it took."""
        return tuple(self._seconds.items())

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The stage of this name runs within the block."""
        logger.info("%s: %s", self._model, name)
        start = time.perf_counter()
        with contextlib.nullcontext() if self._bar is None else self._bar.stage(f"{self._model}: {name}"):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
