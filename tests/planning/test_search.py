"""The search by itself, on regions of numbers: it is compared with all ways to cut them."""

import itertools
import random
from dataclasses import dataclass

import pytest

from fxstream.planning.regions.grids import counts_up_to
from fxstream.planning.search import Option, Search, Span


@dataclass(frozen=True, eq=False)
class Numbers:
    """A region whose options are a table by start and end."""

    name: str
    table: dict
    ends: tuple
    weight: float = 0.0

    def starts(self, end):
        return [start for start in (-1, *self.ends) if start < end]

    def options(self, start, end):
        return self.table[start, end]

    def weights(self, start, end):
        return self.weight * (end - start)

    def largest(self, start, end):
        return f"{self.name}{start}:{end}"


def region(name, seed, length, weight=0.0):
    """A dense option, and streamed ones that are slower the less they need."""
    rng, table = random.Random(seed), {}
    for start, end in itertools.combinations(range(-1, length), 2):
        nodes, held = (f"{name}{start}:{end}",), rng.randint(0, 9)
        grids = [
            Option(Span(nodes, (k,)), rng.randint(1, 40 // k), held, rng.randint(1, 9) * k) for k in (1, 2, 4)
        ]
        dense = Option(None, rng.randint(10, 60), rng.randint(5, 30), rng.randint(1, 9))
        table[start, end] = [[dense], sorted(grids, key=lambda option: option.cost)]
    return Numbers(name, table, tuple(range(length)), weight)


def ways(regions):
    """Every sequence of (option, weights that it needs) through all regions."""
    each = []
    for k, one in enumerate(regions):
        later, last = sum(r.weights(-1, r.ends[-1]) for r in regions[k + 1 :]), one.ends[-1]
        cuts = [c for n in range(len(one.ends)) for c in itertools.combinations(one.ends[:-1], n)]
        spans = [list(itertools.pairwise((-1, *cut, last))) for cut in cuts]
        each.append([
            [(option, later + one.weights(end, last)) for option, (_, end) in zip(chosen, cut, strict=True)]
            for cut in spans
            for chosen in itertools.product(*(itertools.chain(*one.options(*span)) for span in cut))
        ])  # fmt: skip
    for sequence in itertools.product(*each):
        yield [step for of_region in sequence for step in of_region]


def peak(way, held=0.0):
    highest = 0.0
    for option, weights in way:
        highest, held = max(highest, held + option.needs + weights), held + option.holds
    return highest


def cost(way):
    return sum(option.cost for option, _ in way)


def streamed(way):
    return sum(option.span is not None for option, _ in way)


@pytest.mark.parametrize("seed", range(8))
def test_the_fastest_way_is_that_of_all_ways_within_every_budget(seed):
    regions = [region("a", seed, 3, weight=2.0), region("b", seed + 100, 2)]
    search, every = Search(regions, saved=3.0), [(peak(way, 3.0), cost(way)) for way in ways(regions)]
    least, _ = min(every)
    assert search.fastest(least - 1) is None
    for budget in range(int(least), 120, 7):
        fastest = min(seconds for needs, seconds in every if needs <= budget)
        state = search.fastest(budget)
        assert state.cost == fastest
        assert state.peak <= budget


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_way_names_where_the_most_is_needed(seed):
    regions = [region("a", seed, 3), region("b", seed + 100, 2, weight=1.0)]
    state = Search(regions).smallest()
    assert state.peak == min(map(peak, ways(regions)))
    assert state.binding[0] in "ab"
    assert Search(regions).fastest(state.peak).peak <= state.peak


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_count_of_streamed_spans_is_the_most_or_exact(count):
    one = region("a", 5, 4)
    every = list(ways([one]))
    for budget in (60, 200):
        for exact in (False, True):
            allowed = [w for w in every if streamed(w) == count or (not exact and streamed(w) < count)]
            fastest = min((cost(w) for w in allowed if peak(w) <= budget), default=None)
            state = Search([one], count=count, exact=exact).fastest(budget)
            assert fastest == (state.cost if state is not None else None)
            assert state is None or len(state.spans) <= count


def test_more_spans_than_positions_are_none():
    one = region("a", 1, 3)
    assert Search([one], count=4, exact=True).fastest(1e9) is None
    assert Search([one], count=4, exact=True).smallest() is None


def test_of_equal_ways_the_lowest_ranks_are_taken():
    def option(end):
        return [[Option(Span((str(end),)), 1.0, 0.0, float("inf"), rank=(end,))]]

    pairs = itertools.combinations(range(-1, 3), 2)
    one = Numbers("a", {(start, end): option(end) for start, end in pairs}, (0, 1, 2))
    assert [span.nodes for span in Search([one]).smallest().spans] == [("0",), ("1",), ("2",)]
    assert Search([one]).fastest(1.0) is None, "an infinite cost is never within a budget"


def test_numbers_of_tiles_go_up_to_the_most():
    for most, ratio in itertools.product((1, 2, 17, 400), (1.25, 1.3)):
        counts = list(counts_up_to(most, ratio))
        assert counts[:3] == [1, 2, 3][:most]
        assert counts[-1] <= most < max(counts[-1] + 1, counts[-1] * ratio)
        assert all(a < b <= max(a + 1, a * ratio) for a, b in itertools.pairwise(counts))
