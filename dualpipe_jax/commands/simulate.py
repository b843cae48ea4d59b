"""The command `simulate`: makespan, bubbles and activations of a schedule."""

from __future__ import annotations

import argparse
import dataclasses
import json

from dualpipe_jax.commands.arguments import (
    add_lowered,
    add_schedule_arguments,
    parse_costs,
    read_schedule,
)
from dualpipe_jax.lowering import lower
from dualpipe_jax.pictures import title_of
from dualpipe_jax.schedules import Costs, Timeline, simulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `KIND --ranks P --microbatches M [--costs ...] [--lowered] [--json]`."""
    add_schedule_arguments(parser)
    add_lowered(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Simulates the schedule and prints the result."""
    schedule, costs = read_schedule(args), parse_costs(args.costs)
    timeline = simulate(schedule, costs)
    program = {}
    if args.lowered:
        lowered, ideal = lower(schedule), timeline.makespan
        timeline = simulate(lowered, costs)
        program = {
            "num_ticks": lowered.num_ticks,
            "num_slots": lowered.num_slots,
            "event_driven_makespan": ideal,
        }
    print(
        _as_json(timeline, costs, program)
        if args.json
        else _as_table(timeline, costs, program)
    )
    return 0


def _as_json(timeline: Timeline, costs: Costs, program: dict) -> str:
    schedule = timeline.schedule
    return json.dumps(
        {
            "kind": schedule.kind,
            "num_ranks": schedule.num_ranks,
            "num_stages": schedule.num_stages,
            "num_microbatches": schedule.num_microbatches,
            "costs": dataclasses.asdict(costs),
            "lowered": bool(program),
            **program,
            "makespan": timeline.makespan,
            "bubble_ratio": timeline.bubble_ratio,
            "busy": timeline.busy,
            "bubble": timeline.bubble,
            "peak_activations": timeline.peak_activations,
        }
    )


def _as_table(timeline: Timeline, costs: Costs, program: dict) -> str:
    lines = [
        title_of(timeline),
        "costs: " + " ".join(f"{k}={v:g}" for k, v in vars(costs).items()),
    ]
    if program:
        lines.append(
            "lowered: {num_ticks} ticks, {num_slots} activation slots; event-driven, "
            "the makespan is {event_driven_makespan:.6g}".format(**program)
        )
    lines += [
        f"makespan: {timeline.makespan:.6g}",
        f"bubble ratio: {timeline.bubble_ratio:.4f}",
        f"{'rank':>4} {'busy':>10} {'bubble':>10} {'peak activations':>17}",
    ]
    lines += [
        f"{rank:>4} {busy:>10.6g} {bubble:>10.6g} {peak:>17}"
        for rank, (busy, bubble, peak) in enumerate(
            zip(timeline.busy, timeline.bubble, timeline.peak_activations, strict=True)
        )
    ]
    return "\n".join(lines)
