"""The exact search, for ranks that hold a stage and its mirror image.

Cutting a chain into parts whose largest is as small as possible is the classic linear
partition problem, solved by dynamic programming from one end. Here a rank may hold a
stage at the front and its mirror image at the back (DualPipe, DualPipeV), so the tables
grow from both ends at once, one pair of stages at a time.

Legend: K mirrored pairs of stages, with one stage in the middle if their number is
odd. Before pair k, the stages in front have taken k + u layers and those at the back
k + v: u and v count layers beyond the one that every stage has, and together they
never exceed `spare`, the layers beyond one per stage. N = spare + 1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dualpipe_jax.planning.problem import TOLERANCE, PartitionProblem

# So many u' are tried at once: more widen the range of v' to search, fewer cost time.
_BLOCK = 8


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
    """Upper limits of a partition: the load of a rank, and the layers of a stage."""

    load: float
    layers: int


_LOAD = _Goal(lambda options: options.load, np.maximum)
_SQUARES = _Goal(lambda options: options.front**2 + options.back**2, np.add)


class MirroredTables:
    """Dynamic programming over the layers taken from the front and from the back."""

    def __init__(self, problem: PartitionProblem):
        self.problem = problem
        self.num_pairs = problem.num_stages // 2
        self.spare = problem.num_layers - problem.num_stages
        self.behind = np.concatenate([[0.0], np.cumsum(problem.costs[::-1])])
        self.rows = [
            _rows(problem.weights[:, [pair, -1 - pair]])
            for pair in range(self.num_pairs)
        ]

    def solve(self) -> tuple[int, ...]:
        """Returns the layers of each stage: by load, longest stage, then squares."""
        fewest = -(-self.problem.num_layers // self.problem.num_stages)
        limits = _Limits(self._best_load(fewest) * (1 + TOLERANCE), fewest)
        while not np.isfinite((tables := self._fill(_SQUARES, limits))[0][0, 0]):
            limits = limits._replace(layers=limits.layers + 1)
        return self._trace(tables, limits)

    def _best_load(self, fewest: int) -> float:
        """Returns the least load of the busiest rank.

        Low limits keep the tables small, and the best partition within them is the best
        of all.
        """
        cap = self.problem.cap
        least = self._least_load()
        most = self.problem.costs.sum() * self.problem.weights.sum()
        known = self._fill(_LOAD, _Limits(most, fewest))[0][0, 0]
        # Where an end is expensive, short stages can reach the least load.
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
        """Returns a lower bound on the load, from the mean and from single layers."""
        costs, weights = self.problem.costs, self.problem.weights
        slowest = weights.max(axis=0)
        ends = (
            weights[:, 0] * costs[0] + weights[:, -1] * costs[-1]
            if self.problem.num_stages > 1
            else slowest * costs.sum()
        )
        return max(
            costs.sum() * weights.sum(axis=0).min() / len(weights),
            costs.max() * slowest.min(),
            ends.max(),
        )

    def _fill(self, goal: _Goal, limits: _Limits) -> list[np.ndarray]:
        """Returns for each pair [N, N]: the best score of all inside it, at u and v."""
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
        """Returns before each pair, for each u, the range of v to search.

        Outer stages cannot have taken more than the limits allow, and what they leave
        must not be more than the inner stages may take.
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
                rows = np.array(self.rows[pair - 1])
                work += len(rows) / rows.sum(axis=0).min()
        return ranges

    def _furthest(self, sums: np.ndarray, side: int, limits: _Limits) -> list[int]:
        """Returns the largest u (or v) before each pair, as if all stages were full."""
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
        """Returns [N, N]: the score of what pairs leave, a middle stage or nothing."""
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
        """Returns [u', v, v']: the pair's own score joined with the best inside it.

        `ways` are u, then ranges of u', v and v'; u' and v' are u and v after the pair.
        """
        u, next_u, v, next_v = ways
        extra = np.arange(self.spare + 1)
        more_u = (extra[next_u] - u)[:, None, None]
        more_v = (extra[next_v] - extra[v, None])[None]
        front = self.problem.before[pair + 1 + extra[next_u]]
        front = (front - self.problem.before[pair + u])[:, None, None]
        back = self.behind[pair + 1 + extra[next_v]]
        back = (back - self.behind[pair + extra[v], None])[None]
        loads = [front * a + back * b for a, b in self.rows[pair]]
        load = np.where(more_v < 0, np.inf, functools.reduce(np.maximum, loads))
        options = _Options(front, back, 1.0 + np.maximum(more_u, more_v), load)
        score = _limited(goal.score(options), options, limits)
        return goal.join(score, inside[next_u, None, next_v])

    def _trace(self, tables: list[np.ndarray], limits: _Limits) -> tuple[int, ...]:
        """Returns the first partition from outside in that has the least squares."""
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


def _rows(weights: np.ndarray) -> list[tuple[float, float]]:
    """Returns the rows of [num_ranks, 2] weights whose rank may be the busiest."""
    rows = {(float(a), float(b)) for a, b in weights}
    return [
        (a, b)
        for a, b in sorted(rows)
        if not any(c >= a and d >= b for c, d in rows - {(a, b)})
    ]
