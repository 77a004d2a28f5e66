"""Turns in which ranks write into one array: never two into one chunk, and all about equally long."""

from hypothesis import given
from hypothesis import strategies as st

from fxstream.runtime.turns import bands, turns


def grid(rows, columns, tile, chunk):
    """What each tile of a map writes into, in the order of tiles: chunks, none aligned with the tiles."""
    spans = [range(at // chunk, -(-(at + tile) // chunk)) for at in range(0, max(rows, columns) * tile, tile)]
    return [
        frozenset((0, y, x) for y in spans[row] for x in spans[column])
        for row in range(rows)
        for column in range(columns)
    ]


def conflicts(ranks, units, turn_of):
    """Pairs of tiles of different ranks that write into one chunk in one turn."""
    tiles = range(len(ranks))
    return [
        (one, other)
        for one in tiles
        for other in tiles[:one]
        if ranks[one] != ranks[other] and turn_of[one] == turn_of[other] and units[one] & units[other]
    ]


@given(
    *[st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 40), st.integers(1, 5)],
    st.lists(st.floats(0.1, 10), min_size=36, max_size=36),
)
def test_two_ranks_never_write_into_one_chunk_in_one_turn(rows, columns, tile, chunk, count, costs):
    units, costs = grid(rows, columns, tile, chunk), costs[: rows * columns]
    ranks = bands(costs, count)
    assert list(ranks) == sorted(ranks)
    assert conflicts(ranks, units, turns(costs, ranks, units)) == []
    assert conflicts(ranks, units, [0] * len(ranks)) == [] or len(set(turns(costs, ranks, units))) > 1


def test_ranks_wait_little():
    """16 x 16 tiles whose edges lie within chunks, on four ranks: the turns take no longer than the work."""
    units, costs = grid(16, 16, 100, 64), [1.0] * 256
    ranks = bands(costs, 4)
    when = turns(costs, ranks, units)
    assert [ranks.count(rank) for rank in range(4)] == [64] * 4
    loads = [
        [
            sum(1 for owner, turn in zip(ranks, when, strict=True) if (owner, turn) == (rank, now))
            for rank in range(4)
        ]
        for now in range(max(when) + 1)
    ]
    assert sum(map(max, loads)) <= 66


def test_memory_needs_no_turns():
    assert set(turns([1.0] * 9, bands([1.0] * 9, 3), [frozenset()] * 9)) == {0}
