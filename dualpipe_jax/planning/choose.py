"""Which schedule to use: the fastest one whose memory fits, and why.

DualPipe hides communication in its overlapped pairs and pays for it with a second copy
of parameters and gradients. ZB1P fills bubbles with weight gradients and pays with the
residuals that these need. If that does not fit, recomputation may, at a cost that may
exceed the gain. So each combination of schedule, number of microbatches and
recomputation is lowered to the program that would run: its time comes from the
simulator and its memory from its slots, neither of them from a formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from dualpipe_jax.planning import ranking_text
from dualpipe_jax.planning.measured import Measured, lowered
from dualpipe_jax.planning.memory_use import (
    Remat,
    StageMemory,
    check_kind,
    check_number,
)
from dualpipe_jax.planning.ranking import RankedSchedule, Ranking
from dualpipe_jax.schedules import Costs, check_size
from dualpipe_jax.schedules.generators import SCHEDULES


def rank_schedules(
    num_ranks: int,
    num_microbatches: int | Sequence[int],
    costs: Costs,
    memory: StageMemory,
    *,
    limit: float,
    remat: Remat | Sequence[Remat] = (),
    schedules: Sequence[str] | None = None,
    measured_at: int | None = None,
    task_overhead: float = 0.0,
    update_time: float = 0.0,
    exchange_time: float = 0.0,
) -> Ranking:
    """Ranks schedules by the time of a training step, under a memory limit.

    `costs` and `memory` describe one microbatch on one of P stages, a P-th of the
    model; `RankedSchedule` says how those of each candidate follow. The time is that of
    the lowered program, including the waits that its permutes cause.

    Args:
      num_ranks: P.
      num_microbatches: M, or several to choose from.
      costs: of F, I, W, B, F&B and p2p. Without FB, pairs hide nothing. F and B alone
        include the communication that nothing hides there.
      memory: bytes of one of P stages.
      limit: bytes that a device may hold.
      remat: ways to recompute; doing without is always considered.
      schedules: names to choose from; all published ones by default.
      measured_at: the M at which `costs` and `memory` hold; the first of
        `num_microbatches` by default.
      task_overhead: part of the cost of every task, and of every pair, that is the same
        for stages and microbatches of any size.
      update_time: of what follows the pipeline in a training step: reduction of
        gradients, optimizer.
      exchange_time: to bring one stage's parameters to another rank and its gradient
        back, once per training step. DualPipe brings one; 1F1B, none.

    Returns:
      All combinations from best to worst, and those that cannot be built. If none fits,
      `best` is None and the first candidate is the closest to fitting.

    Raises:
      ValueError: an argument is not what it should be, a schedule's name is unknown,
        two kinds of recomputation have the same name, or F is 0.

    References:
      DeepSeek-V3 Technical Report (arXiv:2412.19437), table 2, for parameters and
      activations of 1F1B, ZB1P and DualPipe.

    Examples:
      DeepSeek's costs. With room for a second copy, DualPipe is the fastest; with half
      the memory, V-Half is:

      >>> costs = Costs(F=97, I=104, W=35, FB=129, p2p=1.2)
      >>> memory = StageMemory(
      ...     residuals=2, wgrad_residuals=1, parameters=2, gradients=4)
      >>> rank_schedules(8, 32, costs, memory, limit=48)
      Ranking(11 candidates, 9 fit; best: DualPipe, M=32)
      >>> ranking = rank_schedules(8, 32, costs, memory, limit=24)
      >>> ranking.best.schedule, ranking.best.memory.total
      ('v_half', 20.0)
    """
    num_ranks = check_size("num_ranks", num_ranks)
    sizes = _read_sizes(num_microbatches)
    at = sizes[0] if measured_at is None else measured_at
    measured = Measured(costs, memory, at, task_overhead, update_time, exchange_time)
    limit = check_number("limit", limit, "give a device's bytes.", positive=True)
    variants = (None, *_read_remat(remat))
    candidates, left_out = [], []
    for name, size in itertools.product(_read_names(schedules), sizes):
        try:
            program = lowered(name, num_ranks, size)
        except ValueError as error:
            left_out.append((name, size, str(error)))
        else:
            candidates += [
                measured.candidate(name, program, each, limit) for each in variants
            ]
    candidates.sort(key=_order)
    return Ranking(
        candidates=ranking_text.with_reasons(candidates),
        left_out=tuple(left_out),
        limit=limit,
        notes=_notes(measured, candidates),
    )


def _notes(measured: Measured, candidates: Sequence[RankedSchedule]) -> tuple[str, ...]:
    notes = []
    pair = measured.costs.FB or 0.0
    alone = measured.costs.F + (measured.costs.B or 0.0)
    if pair >= alone:
        notes.append(
            f"FB={pair:g} is no less than F + B = {alone:g}: overlapped pairs are "
            "assumed to hide nothing."
        )
    several = len({each.num_microbatches for each in candidates}) > 1
    if several and not measured.task_overhead:
        notes.append(
            "task_overhead=0: half a microbatch is assumed to cost half, which favours "
            "larger M."
        )
    return tuple(notes)


def _order(candidate: RankedSchedule) -> tuple:
    """Sorts what fits by time, the rest by need; ties, up to rounding, by the other."""
    time, need = (float(f"{x:.9g}") for x in (candidate.time, candidate.memory.total))
    return (not candidate.fits, *((time, need) if candidate.fits else (need, time)))


def _read_sizes(num_microbatches: int | Sequence[int]) -> tuple[int, ...]:
    several = isinstance(num_microbatches, Iterable)
    sizes = tuple(num_microbatches) if several else (num_microbatches,)
    if isinstance(num_microbatches, str) or not sizes:
        raise ValueError(
            f"{num_microbatches=} must be a number of microbatches, or several; use "
            "[16, 32], for example."
        )
    return tuple(dict.fromkeys(check_size("num_microbatches", m) for m in sizes))


def _read_names(schedules: Sequence[str] | None) -> tuple[str, ...]:
    by_function: dict[Callable, str] = {}
    schedules = (schedules,) if isinstance(schedules, str) else schedules
    for name in SCHEDULES if schedules is None else schedules:
        if name not in SCHEDULES:
            raise ValueError(
                f"{schedules=} names {name!r}, which is unknown; use some of "
                f"{', '.join(SCHEDULES)}."
            )
        # Some have two names.
        by_function.setdefault(SCHEDULES[name], name)
    if not by_function:
        raise ValueError(f"{schedules=} names none; leave it out for all.")
    return tuple(by_function.values())


def _read_remat(remat: Remat | Sequence[Remat]) -> tuple[Remat, ...]:
    variants = tuple(remat) if isinstance(remat, Iterable) else (remat,)
    for variant in variants:
        check_kind("remat", variant, Remat)
    names = [variant.name for variant in variants]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"remat has {sorted(twice)} twice; give each its own name.")
    return variants
