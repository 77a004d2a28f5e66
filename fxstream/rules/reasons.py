"""Whether a node can be tiled, and every reason why one cannot, with its text.

Decisions are made on the members of these enums, never on their texts.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["NotTileable", "Reason", "Tileability"]


class Tileability(enum.Enum):
    """The verdict on a node: can a box of its result be computed from a box of its input?"""

    LOCAL = "local"
    SMALL = "small"
    REDUCTION = "reduce"
    GLOBAL = "global"
    NO_RULE = "no rule"


SMALL, REDUCTION, GLOBAL, NO_RULE = (
    Tileability.SMALL,
    Tileability.REDUCTION,
    Tileability.GLOBAL,
    Tileability.NO_RULE,
)


class Reason(enum.Enum):
    """Why a node cannot be computed box by box: what it is instead, and the text, with places for details."""

    # No tiled dim, or none that depends on an image: computed once, outside of the tile loop.
    NO_TILED_DIM = SMALL, "has no tiled dim"
    SHAPE_ARITHMETIC = SMALL, "shape arithmetic"
    NO_IMAGE = SMALL, "does not depend on an image"
    # Reductions over space.
    BATCH_STATISTICS = REDUCTION, "uses batch statistics: every output pixel needs the whole map"
    OBSERVES_RANGE = REDUCTION, "quantises by the range of the whole map"
    NORMALISES_SPACE = REDUCTION, "normalises over space: every output pixel needs the whole map"
    NORMALISES_GROUPS = REDUCTION, "normalises each group over the whole map"
    NORMALISES_CHANNELS = REDUCTION, "normalises each channel over the whole map"
    NORMALISES_POSITIONS = REDUCTION, "normalises over all positions"
    REDUCES_SPACE = REDUCTION, "reduces over space: its result needs the whole map"
    REDUCES_SOME_DIMS = REDUCTION, "reduces some tiled dims and keeps others"
    POOLS_MAP = REDUCTION, "pools the whole map"
    POOLS_SOME_DIMS = REDUCTION, "pools some tiled dims and keeps others"
    LOSS_OVER_SPACE = REDUCTION, "sums a loss over all pixels"
    SUMS_SOME_DIMS = REDUCTION, "sums over some tiled dims and keeps others"
    SUMS_WITH_WHOLE = REDUCTION, "sums products of a map and a tensor without tiled dims over space"
    SUMS_WITH_ROW = REDUCTION, "sums products of a map and one of a single row over space"
    # Operators that need the whole map.
    RANDOM_DRAW = GLOBAL, "draws random numbers for the whole map at once"
    DIFFERENT_DIMS = GLOBAL, "combines maps whose tiled dims differ: {}"
    SOME_DIMS_MISSING = GLOBAL, "`{}` follows some tiled dims and lacks others"
    PIXELS_DIFFER = GLOBAL, "`{}` has {} pixels where {} are needed"
    OTHER_OPERANDS_POSITIONAL = GLOBAL, "its other operands depend on the position in the image"
    WEIGHTS_POSITIONAL = GLOBAL, "its weights depend on the position in the image"
    OPERAND_ALONG_TILED_DIM = GLOBAL, "its per-channel operand lies along a tiled dim"
    ALONG_TILED_DIM = GLOBAL, "works along dims {}, of which one is tiled"
    SLIDES_ALONG_OTHER_DIMS = GLOBAL, "slides along dims {}, but the tiled dims are {}"
    UNBINDS_TILED_DIM = GLOBAL, "takes a tiled dim apart"
    CONCATENATES_TILED_DIM = GLOBAL, "concatenates along a tiled dim"
    MIRRORS_TILED_DIM = GLOBAL, "mirrors a tiled dim: a tile needs the pixels at the opposite end"
    CONCATENATES_WHOLE = GLOBAL, "concatenates maps with a tensor that has no tiled dim"
    MIXES_LAST_DIM = GLOBAL, "mixes all positions of the last tiled dim"
    MIXES_POSITIONS = GLOBAL, "multiplies matrices that mix positions"
    CONTRACTS_POSITIONS = GLOBAL, "contracts dims that may be positions"
    ATTENDS = GLOBAL, "attends to all positions"
    READ_WHOLE = GLOBAL, "is read at all positions, as keys and values are"
    TRANSFORMS_MAP = GLOBAL, "transforms the whole map"
    READS_DATA_POSITIONS = GLOBAL, "reads positions that depend on the data"
    READS_GRID_POSITIONS = GLOBAL, "reads the positions in a grid, which may lie anywhere in the image"
    SHUFFLES_TILED_DIM = GLOBAL, "shuffles a tiled dim"
    CLASSES_ALONG_TILED_DIM = GLOBAL, "its classes or their weights lie along a tiled dim"
    TARGET_DIMS_DIFFER = GLOBAL, "its target has other tiled dims than its input"
    TARGETS_DIFFER = GLOBAL, "has {} targets for {} pixels"
    COUNTS_CLASSES = GLOBAL, "counts the classes of the whole map"
    WRITES_DATA_POSITIONS = GLOBAL, "writes several values, or to positions that depend on the data"
    WRITES_POSITIONS = GLOBAL, "writes to some positions of a tiled dim"
    GATHERS_TILED_DIM = GLOBAL, "gathers along a tiled dim"
    GATHERS_POSITIONS = GLOBAL, "gathers other positions than its own"
    PADS_OPPOSITE = GLOBAL, "pads with pixels of the opposite border, far from every tile's own"
    PADS_UNEVENLY = GLOBAL, "pads unevenly along a dim that is not tiled"
    POOLS_INTEGERS = GLOBAL, "pools {}, which has no minus infinity to pad with"
    AVERAGES_INTEGERS = GLOBAL, "averages {}, which rounds"
    INTERPOLATES_INTEGERS = GLOBAL, "interpolates {}, which rounds"
    JOINS_TILED_DIM = GLOBAL, "reshapes {} to {}, which joins a tiled dim with others"
    SPLITS_TILED_DIM = GLOBAL, "splits a tiled dim"
    SQUEEZES_TILED_DIM = GLOBAL, "removes a tiled dim of one pixel"
    EXPANDS_TILED_DIM = GLOBAL, "expands a tiled dim"
    REPEATS_TILED_DIM = GLOBAL, "repeats a tiled dim"
    REPEATS_UNEVENLY = GLOBAL, "repeats each position as often as a tensor says, or all of them in one row"
    SELECTS_POSITION = GLOBAL, "takes one position of tiled dim {}"
    NO_PIXELS = GLOBAL, "reads or writes a map without pixels"
    IN_PLACE = GLOBAL, "{}"
    ITEM_OF_UNTILED = GLOBAL, "is one of several results of `{}`"
    READ_ALONG_OTHER_DIMS = GLOBAL, "reads `{}` along other dims than before"
    # Operators, or uses of one, that no rule describes.
    UNKNOWN_OPERATOR = NO_RULE, "`{}` has no rule; add one with fxstream.register_rule"
    CODE_OF_ITS_OWN = NO_RULE, "`{}` runs Python code or a block of its own, which no rule can describe"
    FUNCTION_NOT_LOCAL = NO_RULE, "is an autograd function of the user that is not local: {}"
    BINARY_UNDER_REDUCTION = NO_RULE, "is used as a binary operator under a reduction's name"
    COPY_IN_BACKWARD = NO_RULE, "is copied in torch's backward, but not in its forward"
    UNCERTAIN_PIXELS = NO_RULE, "takes pixels that torch's kernels disagree about at this size"
    READS_BITS = NO_RULE, "reads the bits of another type"
    USER = NO_RULE, "{}"

    @property
    def tileability(self) -> Tileability:
        """What a node is for this reason."""
        return self.value[0]


@dataclass(frozen=True, slots=True)
class NotTileable:
    """Why an operator call cannot be evaluated on a box; `dims` are the tiled dims that its result keeps."""

    reason: Reason
    dims: tuple[int, ...] = ()
    details: tuple[object, ...] = ()

    @property
    def tileability(self) -> Tileability:
        """What the node is instead of local."""
        return self.reason.tileability

    def __str__(self) -> str:
        return self.reason.value[1].format(*self.details)
