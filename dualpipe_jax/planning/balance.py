"""Searches for the best contiguous partition; `partition.py` says what is best.

Cutting a chain into parts whose largest is least is the classic linear partition
problem, solved by dynamic programming from one end. Here a rank may hold a stage at
the front and its mirror image at the back (DualPipe, DualPipeV), so the tables grow
from both ends at once, a pair of stages at a time.

Legend: K mirrored pairs of stages, with one stage in the middle if their number is
odd. Before pair k the stages in front have taken k + u layers and those at the back
k + v: u and v count layers beyond the one that every stage has, and together they
never exceed `spare`, the layers beyond one a stage. N = spare + 1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Loads within this fraction of each other are equal. Sums of 1e4 float64 terms err by
# less than 1e-12 of their value, and no cost is known to 1e-9.
TOLERANCE = 1e-9
# Up to so many partitions are compared one by one where no table applies.
MAX_ENUMERATED = 100_000
# So many u' are tried at once: more spread the v' worth a look, fewer cost time.
_BLOCK = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be partitioned.

    Attributes:
      costs: [num_layers] float64, what goes with the first or the last layer included.
      weights: [num_ranks, num_stages] float64, a rank's time per unit of stage cost.
      cap: the most layers a stage may have.
    """

    costs: np.ndarray
    weights: np.ndarray
    cap: int

    @property
    def num_layers(self) -> int:
        return len(self.costs)

    @property
    def num_stages(self) -> int:
        return self.weights.shape[1]

    @functools.cached_property
    def before(self) -> np.ndarray:
        """[num_layers + 1]: cost of all layers before one."""
        return np.concatenate([[0.0], np.cumsum(self.costs)])

    def stage_costs(self, sizes: np.ndarray) -> np.ndarray:
        """Costs of stages, [num_partitions, num_stages] like `sizes`."""
        ends = np.cumsum(sizes, axis=1)
        return self.before[ends] - self.before[ends - sizes]

    def loads(self, sizes: np.ndarray) -> np.ndarray:
        """Loads of ranks: [num_partitions, num_ranks]."""
        return self.stage_costs(sizes) @ self.weights.T


def solve(problem: Problem) -> tuple[tuple[int, ...], bool]:
    """Returns the layers of each stage, and whether no partition is better."""
    # Unit scale: squares of costs must neither overflow nor vanish.
    problem = Problem(
        costs=problem.costs / problem.costs.max(),
        weights=problem.weights / problem.weights.max(),
        cap=min(problem.cap, problem.num_layers - problem.num_stages + 1),
    )
    if _is_mirrored(problem.weights):
        return _Tables(problem).solve(), True
    if math.comb(problem.num_layers - 1, problem.num_stages - 1) <= MAX_ENUMERATED:
        return _enumerate(problem), True
    return _search(problem), False


def outside_in(num_stages: int) -> list[int]:
    """The stages in the order 0, S-1, 1, S-2, ..., in which ties are broken.

    Examples:
      >>> outside_in(5)
      [0, 4, 1, 3, 2]
    """
    return sorted(range(num_stages), key=lambda s: min(2 * s, 2 * (num_stages - s) - 1))


def _is_mirrored(weights: np.ndarray) -> bool:
    """Whether no rank holds stages other than one and its mirror image."""
    num_stages = weights.shape[1]
    return all(
        len({min(s, num_stages - 1 - s) for s in np.flatnonzero(row)}) == 1
        for row in weights
    )


class _Options(NamedTuple):
    """Ways to fill a pair: axes [u' of a block, v, v'], or what broadcasts to them."""

    front: np.ndarray  # cost of the pair's front stage
    back: np.ndarray
    longer: np.ndarray  # layers in the longer stage of the two
    load: np.ndarray  # of the pair's busiest rank


class _Goal(NamedTuple):
    """What a table minimises: a score for each pair, and how scores combine."""

    score: Callable[[_Options], np.ndarray]
    join: np.ufunc


class _Limits(NamedTuple):
    """What a partition must keep: the most load of a rank, and layers of a stage."""

    load: float
    layers: int


_LOAD = _Goal(lambda options: options.load, np.maximum)
_SQUARES = _Goal(lambda options: options.front**2 + options.back**2, np.add)


class _Tables:
    """The exact search, where ranks hold mirrored stages."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.num_pairs = problem.num_stages // 2
        self.spare = problem.num_layers - problem.num_stages
        self.behind = np.concatenate([[0.0], np.cumsum(problem.costs[::-1])])

    def solve(self) -> tuple[int, ...]:
        """Layers of each stage: least load, then shortest, then least squares."""
        fewest = -(-self.problem.num_layers // self.problem.num_stages)
        limits = _Limits(self._best_load(fewest) * (1 + TOLERANCE), fewest)
        while not np.isfinite((tables := self._fill(_SQUARES, limits))[0][0, 0]):
            limits = limits._replace(layers=limits.layers + 1)
        return self._trace(tables, limits)

    def _best_load(self, fewest: int) -> float:
        """The least load of the busiest rank.

        Low limits keep the tables small, and the best that keeps them is best of all.
        """
        cap = self.problem.cap
        least = self._least_load()
        most = self.problem.costs.sum() * self.problem.weights.sum()
        known = self._fill(_LOAD, _Limits(most, fewest))[0][0, 0]
        # Where an end is dear, the least load is within reach of short stages.
        for layers in (fewest + 1, 2 * fewest):
            if known <= least * (1 + TOLERANCE) or layers >= cap:
                break
            limits = _Limits(least * (1 + TOLERANCE), layers)
            known = min(known, self._fill(_LOAD, limits)[0][0, 0])
        load = least
        for excess in itertools.chain([TOLERANCE], 0.02 * 2.0 ** np.arange(1000)):
            if known <= load * (1 + TOLERANCE):
                break
            load = min(least * (1 + excess), known)
            known = min(known, self._fill(_LOAD, _Limits(load, cap))[0][0, 0])
        return known

    def _least_load(self) -> float:
        """No partition has a lower load: the mean's share, and single layers'."""
        costs, weights = self.problem.costs, self.problem.weights
        dearest = weights.max(axis=0)
        ends = (
            weights[:, 0] * costs[0] + weights[:, -1] * costs[-1]
            if self.problem.num_stages > 1
            else dearest * costs.sum()
        )
        return max(
            costs.sum() * weights.sum(axis=0).min() / len(weights),
            costs.max() * dearest.min(),
            ends.max(),
        )

    def _fill(self, goal: _Goal, limits: _Limits) -> list[np.ndarray]:
        """For each pair [N, N]: the best score of all that lies inside, at u and v."""
        tables = [self._innermost(goal, limits)]
        ranges = self._ranges(limits)
        for pair in reversed(range(self.num_pairs)):
            table = np.full_like(tables[0], np.inf)
            first, stop = ranges[pair]
            first_next, stop_next = ranges[pair + 1]
            for u in np.flatnonzero(first < stop).tolist():
                v = slice(int(first[u]), int(stop[u]))
                end = min(u + limits.layers, self.spare + 1)
                for start in range(u, end, _BLOCK):
                    block = slice(start, min(start + _BLOCK, end))
                    next_v = slice(
                        max(v.start, int(first_next[block].min())),
                        int(stop_next[block].max()),
                    )
                    if next_v.start >= next_v.stop:
                        continue
                    ways = (u, block, v, next_v)
                    score = self._score(goal, limits, pair, ways, tables[0])
                    table[u, v] = np.minimum(table[u, v], score.min(axis=(0, 2)))
            tables.insert(0, table)
        return tables

    def _ranges(self, limits: _Limits) -> list[tuple[np.ndarray, np.ndarray]]:
        """Before each pair, for each u, the first v worth a look and that after all.

        Outer stages cannot have taken more than they may, and what they leave must not
        be more than the inner stages may take.
        """
        u, v = np.indices((self.spare + 1, self.spare + 1))
        last_u = self._furthest(self.problem.before, 1, limits)
        last_v = self._furthest(self.behind, -1, limits)
        odd = self.problem.num_stages % 2
        # Work and layers that all inside can take, from the middle outwards.
        work = odd / self.problem.weights[:, self.num_pairs * odd].max()
        ranges = []
        for pair in range(self.num_pairs, -1, -1):
            inside = self.problem.before[
                self.problem.num_layers - pair - v.clip(max=self.spare - u)
            ]
            inside = inside - self.problem.before[pair + u]
            room = limits.layers * (2 * (self.num_pairs - pair) + odd)
            fits = (u + v <= self.spare) & (u <= last_u[pair]) & (v <= last_v[pair])
            fits &= self.problem.num_layers - 2 * pair - u - v <= room
            fits &= inside <= limits.load * work * (1 + TOLERANCE) + TOLERANCE
            first = np.where(fits, v, self.spare + 1).min(axis=1)
            ranges.insert(0, (first, np.where(fits, v + 1, 0).max(axis=1)))
            if pair:
                # No pair exceeds the limit in the sum of its ranks' loads either.
                rows = np.array(self._rows(pair - 1))
                work += len(rows) / rows.sum(axis=0).min()
        return ranges

    def _furthest(self, sums: np.ndarray, side: int, limits: _Limits) -> list[int]:
        """The largest u (or v) before each pair if every stage takes all it can."""
        reached = [0]
        for pair in range(self.num_pairs):
            taken = pair + reached[-1]
            weight = self.problem.weights[:, pair if side > 0 else -1 - pair].max()
            room = sums[taken] + limits.load / weight * (1 + TOLERANCE) + TOLERANCE
            ends = int(np.searchsorted(sums, room, side="right")) - 1
            ends = min(ends, taken + limits.layers)
            reached.append(min(max(ends - pair - 1, 0), self.spare))
        return reached

    def _innermost(self, goal: _Goal, limits: _Limits) -> np.ndarray:
        """[N, N]: the score of what the pairs leave, a middle stage or nothing."""
        u, v = np.indices((self.spare + 1, self.spare + 1))
        left = self.spare - u - v
        if self.problem.num_stages % 2 == 0:
            return np.where(left == 0, 0.0, np.inf)
        start = self.num_pairs + np.where(left < 0, 0, u)
        stop = start + 1 + np.maximum(left, 0)
        cost = self.problem.before[stop] - self.problem.before[start]
        load = cost * self.problem.weights[:, self.num_pairs].max()
        options = _Options(cost, np.zeros_like(cost), left + 1.0, load)
        return np.where(
            left < 0, np.inf, _limited(goal.score(options), options, limits)
        )

    def _score(
        self,
        goal: _Goal,
        limits: _Limits,
        pair: int,
        ways: tuple[int, slice, slice, slice],
        inside: np.ndarray,
    ) -> np.ndarray:
        """[u', v, v']: the pair's own score joined with the best that lies inside.

        `ways` are u, then ranges of u', v and v'; u' and v' are the u and v after.
        """
        u, next_u, v, next_v = ways
        extra = np.arange(self.spare + 1)
        more_u = (extra[next_u] - u)[:, None, None]
        more_v = (extra[next_v] - extra[v, None])[None]
        front = self.problem.before[pair + 1 + extra[next_u]]
        front = (front - self.problem.before[pair + u])[:, None, None]
        back = self.behind[pair + 1 + extra[next_v]]
        back = (back - self.behind[pair + extra[v], None])[None]
        loads = [front * a + back * b for a, b in self._rows(pair)]
        load = np.where(more_v < 0, np.inf, functools.reduce(np.maximum, loads))
        options = _Options(front, back, 1.0 + np.maximum(more_u, more_v), load)
        score = _limited(goal.score(options), options, limits)
        return goal.join(score, inside[next_u, None, next_v])

    @functools.cache  # noqa: B019  (as short-lived as the tables)
    def _rows(self, pair: int) -> list[tuple[float, float]]:
        """Weights of the pair's two stages, on each rank that may be the busiest."""
        rows = {
            (float(a), float(b)) for a, b in self.problem.weights[:, [pair, -1 - pair]]
        }
        return [
            (a, b)
            for a, b in sorted(rows)
            if not any(c >= a and d >= b for c, d in rows - {(a, b)})
        ]

    def _trace(self, tables: list[np.ndarray], limits: _Limits) -> tuple[int, ...]:
        """Of all partitions with the least squares, the first from outside in."""
        budget = tables[0][0, 0] * (1 + TOLERANCE)
        u = v = 0
        fronts: list[int] = []
        backs: list[int] = []
        for pair, inside in enumerate(tables[1:]):
            beyond = slice(v, self.spare + 1 - u)
            ways = (u, slice(u, self.spare + 1 - v), slice(v, v + 1), beyond)
            score = self._score(_SQUARES, limits, pair, ways, inside)[:, 0]
            first = np.argwhere(score <= max(budget, score.min()))[0]
            budget -= score[tuple(first)] - inside[u + first[0], v + first[1]]
            fronts.append(1 + int(first[0]))
            backs.append(1 + int(first[1]))
            u, v = u + int(first[0]), v + int(first[1])
        middle = [1 + self.spare - u - v] if self.problem.num_stages % 2 else []
        return (*fronts, *middle, *reversed(backs))


def _limited(score: np.ndarray, options: _Options, limits: _Limits) -> np.ndarray:
    out = (options.load > limits.load) | (options.longer > limits.layers)
    return np.where(out, np.inf, score)


def _enumerate(problem: Problem) -> tuple[int, ...]:
    """The best of all partitions, one by one."""
    cuts = itertools.combinations(range(1, problem.num_layers), problem.num_stages - 1)
    inner = np.array(list(cuts), dtype=np.int64).reshape(-1, problem.num_stages - 1)
    sizes = np.diff(inner, axis=1, prepend=0, append=problem.num_layers)
    return _best(problem, sizes[sizes.max(axis=1) <= problem.cap])


def _best(problem: Problem, sizes: np.ndarray) -> tuple[int, ...]:
    """The best of given partitions, [num_partitions, num_stages], by all rules."""
    loads = problem.loads(sizes).max(axis=1)
    sizes = sizes[loads <= loads.min() * (1 + TOLERANCE)]
    longest = sizes.max(axis=1)
    sizes = sizes[longest == longest.min()]
    squares = (problem.stage_costs(sizes) ** 2).sum(axis=1)
    sizes = sizes[squares <= squares.min() * (1 + TOLERANCE)]
    order = outside_in(problem.num_stages)
    first = np.lexsort(sizes[:, order[::-1]].T)[0]
    return tuple(sizes[first].tolist())


def _search(problem: Problem) -> tuple[int, ...]:
    """Steepest descent from two starts; the result may not be the best.

    A move takes one layer from a stage and gives one to another, whichever they are;
    the cuts between them shift along. First the ranks' sorted loads fall, largest
    first, and then, with the largest kept, the longest stage and the squares.
    """
    alone = dataclasses.replace(problem, weights=np.diag(problem.weights.max(axis=0)))
    even, extra = divmod(problem.num_layers, problem.num_stages)
    inner_first = outside_in(problem.num_stages)[::-1]
    starts = [
        list(_Tables(alone).solve()),
        [even + (inner_first.index(s) < extra) for s in range(problem.num_stages)],
    ]
    unit = TOLERANCE * problem.loads(np.array(starts)).max()

    def loads(sizes: np.ndarray) -> np.ndarray:
        return np.round(np.sort(problem.loads(sizes)) / unit)

    def lengths(sizes: np.ndarray) -> np.ndarray:
        squares = (problem.stage_costs(sizes) ** 2).sum(axis=1)
        rows = [np.round(squares / TOLERANCE), sizes.max(axis=1), loads(sizes)[:, -1]]
        return np.stack(rows, axis=1)

    ends = [
        _descend(_descend(np.array(start), problem.cap, loads), problem.cap, lengths)
        for start in starts
    ]
    return _best(problem, np.stack(ends))


def _descend(
    sizes: np.ndarray, cap: int, score: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Takes the best move as long as one helps; a score's last column counts most."""
    num_stages = len(sizes)
    give, take = np.nonzero(~np.eye(num_stages, dtype=bool))
    moves = np.zeros((len(give), num_stages), dtype=np.int64)
    moves[np.arange(len(give)), give] -= 1
    moves[np.arange(len(give)), take] += 1
    while True:
        nearby = sizes + moves[(sizes[give] > 1) & (sizes[take] < cap)]
        scores = score(np.concatenate([sizes[None], nearby]))
        best = np.lexsort(scores.T)[0]  # stable: 0 unless a move is truly better
        if best == 0:
            return sizes
        sizes = nearby[best - 1]
