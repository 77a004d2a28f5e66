"""The drawings of `how_it_works.md`, and the numbers that it quotes.

    python examples/pictures/draw.py

Nothing is painted by hand: boxes, grids, megabytes and factors are those of `fxstream.plan`, and the numbers in
the tiles of the third drawing are computed from the tiles.
"""

from demand import demand
from reductions import reductions
from segments import segments

if __name__ == "__main__":
    demand()
    segments()
    reductions()
