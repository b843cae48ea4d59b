"""Searches for the best contiguous partition; `partition_layers` says what is best.

Ranks that hold mirrored stages are solved exactly by dynamic programming (`mirrored`).
Other assignments are enumerated where that is affordable, else searched locally.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np

from dualpipe_jax.planning.mirrored import MirroredTables
from dualpipe_jax.planning.problem import TOLERANCE, PartitionProblem, outside_in

# Up to so many partitions are compared one by one where no table applies.
MAX_ENUMERATED = 100_000


def solve(problem: PartitionProblem) -> tuple[tuple[int, ...], bool]:
    """Returns the layers of each stage, and whether no partition is better."""
    # Unit scale: squares of costs must neither overflow nor vanish.
    problem = PartitionProblem(
        costs=problem.costs / problem.costs.max(),
        weights=problem.weights / problem.weights.max(),
        cap=min(problem.cap, problem.num_layers - problem.num_stages + 1),
    )
    if _is_mirrored(problem.weights):
        return MirroredTables(problem).solve(), True
    if math.comb(problem.num_layers - 1, problem.num_stages - 1) <= MAX_ENUMERATED:
        return _enumerate(problem), True
    return _search(problem), False


def _is_mirrored(weights: np.ndarray) -> bool:
    """Returns whether every rank holds one stage, or one and its mirror image."""
    num_stages = weights.shape[1]
    return all(
        len({min(s, num_stages - 1 - s) for s in np.flatnonzero(row)}) == 1
        for row in weights
    )


def _enumerate(problem: PartitionProblem) -> tuple[int, ...]:
    """Returns the best of all partitions, compared one by one."""
    cuts = itertools.combinations(range(1, problem.num_layers), problem.num_stages - 1)
    inner = np.array(list(cuts), dtype=np.int64).reshape(-1, problem.num_stages - 1)
    sizes = np.diff(inner, axis=1, prepend=0, append=problem.num_layers)
    return _best(problem, sizes[sizes.max(axis=1) <= problem.cap])


def _best(problem: PartitionProblem, sizes: np.ndarray) -> tuple[int, ...]:
    """Returns the best of `sizes`, [num_partitions, num_stages], by all rules."""
    loads = problem.loads(sizes).max(axis=1)
    sizes = sizes[loads <= loads.min() * (1 + TOLERANCE)]
    longest = sizes.max(axis=1)
    sizes = sizes[longest == longest.min()]
    squares = (problem.stage_costs(sizes) ** 2).sum(axis=1)
    sizes = sizes[squares <= squares.min() * (1 + TOLERANCE)]
    order = outside_in(problem.num_stages)
    first = np.lexsort(sizes[:, order[::-1]].T)[0]
    return tuple(sizes[first].tolist())


def _search(problem: PartitionProblem) -> tuple[int, ...]:
    """Returns the result of steepest descent from two starts, maybe not the best.

    A move takes one layer from any stage and gives one to any other; the cuts between
    them shift along. The first descent lowers the ranks' sorted loads, largest first;
    the second keeps the largest load and lowers the longest stage and the squares.
    """
    alone = dataclasses.replace(problem, weights=np.diag(problem.weights.max(axis=0)))
    even, extra = divmod(problem.num_layers, problem.num_stages)
    inner_first = outside_in(problem.num_stages)[::-1]
    starts = [
        list(MirroredTables(alone).solve()),
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
    """Takes the best move while one helps; a score's last column counts most."""
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
