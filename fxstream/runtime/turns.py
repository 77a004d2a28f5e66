"""Which rank runs which tile, and when, where ranks that share tiles write them into one array.

NOTE [writing by turns]
1. An array is written in units (chunks or shards), each of which is read, changed and written whole. Two ranks
   must not write into one at the same time.
2. Each rank runs a band: consecutive tiles, of about the same arithmetic. Only tiles at the ends of bands share
   units with those of other ranks.
3. A tile waits for a later turn where a rank before it writes into its units. Between turns ranks wait for each
   other.
4. Tiles that share units with their own rank's only fill the turns, so that all ranks end them at about the same
   time.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bands", "turns"]

Unit = tuple[int, ...]


def bands(costs: Sequence[float], count: int) -> tuple[int, ...]:
    """The rank of each tile: consecutive tiles, of about the same cost per rank.

    >>> bands([1.0, 1.0, 2.0, 1.0, 1.0], 2)
    (0, 0, 1, 1, 1)
    """
    total, before, ranks = sum(costs), 0.0, []
    for cost in costs:
        ranks.append(min(count - 1, int((before + cost / 2) / total * count)))
        before += cost
    return tuple(ranks)


def turns(costs: Sequence[float], ranks: Sequence[int], units: Sequence[frozenset[Unit]]) -> tuple[int, ...]:
    """The turn of each tile, by its cost, its rank (in rising order) and the units that it writes into.

    Tiles of different ranks that write into one unit have different turns.

    >>> first, second, third = (frozenset({(unit,)}) for unit in range(3))
    >>> turns([1.0] * 4, [0, 0, 1, 1], [first, second, second, third])
    (1, 0, 1, 0)
    """
    earliest = _earliest(ranks, units)
    count = 1 + max((turn for turn in earliest if turn is not None), default=0)
    chosen = [0] * len(ranks)
    for rank in set(ranks):
        mine = [i for i, owner in enumerate(ranks) if owner == rank]
        free = [i for i in mine if earliest[i] is None]
        share, spent = sum(costs[i] for i in mine) / count, 0.0
        for turn in range(count):
            spent += sum(costs[i] for i in mine if earliest[i] == turn)
            while free and (turn == count - 1 or spent + costs[free[0]] / 2 < share * (turn + 1)):
                spent += costs[free[0]]
                earliest[free.pop(0)] = turn
        for i in mine:
            chosen[i] = earliest[i] or 0
    return tuple(chosen)


def _earliest(ranks: Sequence[int], units: Sequence[frozenset[Unit]]) -> list[int | None]:
    """The first turn that is possible for each tile; None where its units are its own rank's alone."""
    last: dict[Unit, dict[int, int]] = {}
    earliest = []
    for rank, mine in zip(ranks, units, strict=True):
        before = (turn for unit in mine for other, turn in last.get(unit, {}).items() if other < rank)
        turn = 1 + max(before, default=-1)
        for unit in mine:
            by_rank = last.setdefault(unit, {})
            by_rank[rank] = max(turn, by_rank.get(rank, 0))
        earliest.append(turn)
    shared = {unit for unit, by_rank in last.items() if len(by_rank) > 1}
    return [turn if not shared.isdisjoint(mine) else None for turn, mine in zip(earliest, units, strict=True)]
