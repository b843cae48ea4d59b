"""Which schedule to use: the fastest whose memory fits, and why.

DualPipe hides communication in its overlapped pairs and pays for it with a second copy
of parameters and gradients. ZB1P fills bubbles with weight gradients and pays with what
waits for them. Where that does not fit, one recomputes, and may lose more than one
gained. So each combination of schedule, number of microbatches and recomputation is
lowered to the program that would run; its time comes from the simulator, its memory
from the slots that it has. No formula stands for either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dualpipe_jax.lowering import Program, lower
from dualpipe_jax.planning import ranking_text
from dualpipe_jax.planning.memory_use import (
    MemoryUse,
    Remat,
    StageMemory,
    check_number,
    memory_of,
    stages_moved,
)
from dualpipe_jax.planning.ranking import RankedSchedule, Ranking
from dualpipe_jax.schedules import Costs, check_size, simulate
from dualpipe_jax.schedules.generators import SCHEDULES

__all__ = [
    "MemoryUse",
    "RankedSchedule",
    "Ranking",
    "Remat",
    "StageMemory",
    "rank_schedules",
]


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
    """Ranks schedules by the time of a training step, under a limit of memory.

    `costs` and `memory` describe one microbatch on one of P stages, a P-th of the
    model. From these follow all the others:

    - A schedule of 2P stages (DualPipeV) has stages half as large: half the costs, the
      residuals and the parameters; messages stay as they are.
    - A training step has the same tokens whatever M is: with twice as many microbatches
      each is half as large, and with it costs, residuals and messages. The part
      `task_overhead` of every cost does not shrink, and neither does the workspace.
    - A schedule with overlapped pairs pays `costs.FB` for them, another one F and B.
    - Recomputation adds its cost to every B, I and pair.
    - What is at rest is held once. Accumulators are held for every stage that a rank
      runs, and so are copies of its parameters, unless it runs its own stage only:
      DualPipe runs two stages, DualPipeV two halves from elsewhere.

    The time is that of the lowered program, with the waits that its permutes cause.

    Args:
      num_ranks: P.
      num_microbatches: M, or several to choose from.
      costs: of F, I, W, B, F&B and p2p. Without FB, pairs hide nothing. F and B on
        their own include the communication that nothing hides there.
      memory: bytes of one of P stages.
      limit: bytes that a device may keep.
      remat: what may be recomputed; doing without is always considered.
      schedules: names to choose from; all published ones by default.
      measured_at: the M at which `costs` and `memory` hold; the first of
        `num_microbatches` by default.
      task_overhead: part of the cost of every task, and of every pair, that is the same
        for stages and microbatches of any size.
      update_time: of what follows the pipeline in a training step: reduction of
        gradients, optimizer.
      exchange_time: to bring one stage's parameters to another rank and its gradient
        back, once a training step. DualPipe brings one; 1F1B, none.

    Returns:
      All combinations from the best to the worst, and what could not be built. Where
      nothing fits, `best` is None and the first candidate lacks least.

    Raises:
      ValueError: an argument is not what it should be, a schedule's name is unknown,
        two kinds of recomputation have the same name, or F is 0.

    References:
      DeepSeek-V3 Technical Report (arXiv:2412.19437), table 2, for parameters and
      activations of 1F1B, ZB1P and DualPipe.

    Examples:
      DeepSeek's costs. With room for a second copy, DualPipe is the fastest:

      >>> costs = Costs(F=97, I=104, W=35, FB=129, p2p=1.2)
      >>> memory = StageMemory(residuals=2, crossing=1, parameters=2, gradients=4)
      >>> rank_schedules(8, 32, costs, memory, limit=48)
      Ranking(5 candidates, 4 fit; best: DualPipe, M=32)
      >>> ranking = rank_schedules(8, 32, costs, memory, limit=24)
      >>> ranking.best.schedule, ranking.best.memory.total
      ('1f1b', 22.0)
    """
    num_ranks = check_size("num_ranks", num_ranks)
    sizes = _sizes(num_microbatches)
    reference = sizes[0]
    if measured_at is not None:
        reference = check_size("measured_at", measured_at)
    _check_kind("costs", costs, Costs)
    _check_kind("memory", memory, StageMemory)
    check_number("costs.F", costs.F, "give what was measured.", positive=True)
    limit = check_number("limit", limit, "give a device's bytes.", positive=True)
    in_unit = "give it in the unit of costs."
    task_overhead = check_number("task_overhead", task_overhead, in_unit)
    once = check_number("update_time", update_time, in_unit)
    exchange_time = check_number("exchange_time", exchange_time, in_unit)
    variants = (None, *_variants(remat))

    candidates, left_out = [], []
    for name in _names(schedules):
        for size in sizes:
            try:
                program = _lowered(name, num_ranks, size)
            except ValueError as error:
                left_out.append((name, size, str(error)))
                continue
            microbatch = reference / size
            exchange = exchange_time * stages_moved(program)
            for variant in variants:
                scaled = _scaled(costs, variant, program, microbatch, task_overhead)
                makespan, ratio = _simulated(name, num_ranks, size, scaled)
                candidates.append(
                    RankedSchedule(
                        schedule=name,
                        num_microbatches=size,
                        remat="none" if variant is None else variant.name,
                        time=makespan + once + exchange,
                        bubble_ratio=ratio,
                        bubble=ratio * makespan,
                        memory=memory_of(program, memory, variant, microbatch),
                        limit=limit,
                        costs=scaled,
                        program=program,
                    )
                )
    candidates.sort(key=_order)
    return Ranking(
        candidates=ranking_text.with_reasons(candidates),
        left_out=tuple(left_out),
        limit=limit,
        notes=_notes(costs, candidates, task_overhead),
    )


def _notes(
    costs: Costs, candidates: Sequence[RankedSchedule], task_overhead: float
) -> tuple[str, ...]:
    notes = []
    alone = costs.F + (costs.B or 0.0)
    if (costs.FB or 0.0) >= alone:
        notes.append(
            f"FB={costs.FB:g} is no less than F + B = {alone:g}: overlapped pairs are "
            "taken to hide nothing."
        )
    if not task_overhead and len({each.num_microbatches for each in candidates}) > 1:
        notes.append(
            "task_overhead=0: half a microbatch is taken to cost half, which flatters "
            "the larger M."
        )
    return tuple(notes)


def _order(candidate: RankedSchedule) -> tuple:
    """Fitting ones by time, the others by need; equals (but for rounding) by both."""
    time, need = (float(f"{x:.9g}") for x in (candidate.time, candidate.memory.total))
    return (not candidate.fits, *((time, need) if candidate.fits else (need, time)))


def _scaled(
    costs: Costs,
    remat: Remat | None,
    program: Program,
    microbatch: float,
    task_overhead: float,
) -> Costs:
    """Costs of a stage of this program on a microbatch of this relative size."""
    share = microbatch * program.schedule.num_ranks / program.schedule.num_stages

    def part(cost: float, again: float = 0.0) -> float:
        fixed = min(task_overhead, cost)
        return fixed + (cost - fixed + again) * share

    again = pair = 0.0
    if remat is not None:
        again = costs.F if remat.cost is None else remat.cost
        pair = again if remat.overlapped_cost is None else remat.overlapped_cost
    return Costs(
        F=part(costs.F),
        I=part(costs.I, again),
        W=part(costs.W),
        B=part(costs.B, again),  # pyright: ignore[reportArgumentType]
        FB=part(costs.FB, pair),  # pyright: ignore[reportArgumentType]
        p2p=costs.p2p * microbatch,
    )


# Building and lowering is most of the work, up to a second for P=16, M=128, and does
# not depend on costs or memory: who asks again with others should not wait again.
@functools.lru_cache(maxsize=64)
def _lowered(name: str, num_ranks: int, num_microbatches: int) -> Program:
    return lower(SCHEDULES[name](num_ranks, num_microbatches))


@functools.lru_cache(maxsize=1024)
def _simulated(
    name: str, num_ranks: int, num_microbatches: int, costs: Costs
) -> tuple[float, float]:
    """(makespan, bubble ratio)."""
    timeline = simulate(_lowered(name, num_ranks, num_microbatches), costs)
    return timeline.makespan, timeline.bubble_ratio


def _sizes(num_microbatches: int | Sequence[int]) -> tuple[int, ...]:
    several = isinstance(num_microbatches, Iterable)
    sizes = tuple(num_microbatches) if several else (num_microbatches,)
    if isinstance(num_microbatches, str) or not sizes:
        raise ValueError(
            f"{num_microbatches=} must be a number of microbatches, or several; use "
            "[16, 32], say."
        )
    return tuple(dict.fromkeys(check_size("num_microbatches", m) for m in sizes))


def _names(schedules: Sequence[str] | None) -> tuple[str, ...]:
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


def _variants(remat: Remat | Sequence[Remat]) -> tuple[Remat, ...]:
    variants = tuple(remat) if isinstance(remat, Iterable) else (remat,)
    for variant in variants:
        _check_kind("remat", variant, Remat)
    names = [variant.name for variant in variants]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"remat has {sorted(twice)} twice; give each its own name.")
    return variants


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} must be a {kind.__name__}; make one.")
