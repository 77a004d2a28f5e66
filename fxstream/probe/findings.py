"""What the probe finds: mismatches, what could only be checked one-sidedly, and why a part was not probed."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxstream.errors import FxstreamError
from fxstream.graph.typed_graph import TypedGraph

__all__ = ["DIRECTIONS", "MIXES_IMAGES", "Findings", "Mismatch", "TooLargeError", "UnprobedError"]

DIRECTIONS = ("forward", "values", "backward")
"""The measurements, in the order in which their mismatches are reported."""
MIXES_IMAGES = "it mixes the images of a batch"
"""Why a part is not probed whose two images, one per tile, are not apart."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One disagreement: where, along which axis, in which of the three measurements, claimed and measured.

    A wrong claim shows forward at its own operator and backward at the operator that it reads.
    """

    node: str
    operator: str
    module: str
    source: str
    axis: int
    direction: str
    what: str
    claimed: str
    measured: str

    def __str__(self) -> str:
        place = f"`{self.module or self.node}` ({self.operator})" + (f" at {self.source}" if self.source else "")
        what = f"axis {self.axis}, {self.direction}, {self.what}"
        return f"{place}, {what}: claimed {self.claimed}, measured {self.measured}"


class UnprobedError(FxstreamError):
    """Why a part cannot be run on a strip."""


class TooLargeError(FxstreamError):
    """A strip needs more memory than there is for it."""


@dataclass
class Findings:
    """Collects what the measurements find about the nodes of a part; blurred ones were checked one-sidedly."""

    graph: TypedGraph
    mismatches: list[Mismatch] = field(default_factory=list)
    blurred_forward: set[str] = field(default_factory=set)
    blurred_backward: set[str] = field(default_factory=set)

    @property
    def blurred(self) -> set[str]:
        """The nodes that neither direction could check for equality."""
        return self.blurred_forward & self.blurred_backward

    def add(self, node: str, axis: int, direction: str, what: str, claimed: object, measured: object) -> None:
        """Note a disagreement."""
        verdict = self.graph.verdicts[node]
        place = (verdict.node, verdict.operator, verdict.module, verdict.source)
        self.mismatches.append(Mismatch(*place, axis, direction, what, str(claimed), str(measured)))
