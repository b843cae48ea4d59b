"""The command `choose`: which schedule to use, from costs and bytes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from dualpipe_jax.commands.arguments import parse_costs, read_fields, read_integers
from dualpipe_jax.pictures import parse_bytes
from dualpipe_jax.planning import Remat, StageMemory, rank_schedules
from dualpipe_jax.schedules.generators import SCHEDULES, check_size

_ACTIVATIONS = (
    "residuals",
    "wgrad_residuals",
    "message",
    "workspace",
    "pair_workspace",
)
_HELD = ("limit", "parameters", "gradients", "at_rest", "optimizer", "other")
_COSTS = ("cost", "overlapped_cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--ranks P --microbatches M,... --costs ... --memory ... [--json]`."""
    add = parser.add_argument
    add("--ranks", metavar="P", type=int, required=True, help="size of the pipeline")
    add(
        "--microbatches",
        metavar="M,...",
        required=True,
        help="of one training step; costs and bytes hold at the first",
    )
    add(
        "--costs",
        metavar="F=97,I=104,...",
        required=True,
        help="of one of P stages on one microbatch: F, I, W; B (default I+W), FB "
        "(default F+B), p2p (default 0)",
    )
    add(
        "--activations",
        metavar="residuals=1.5GiB,...",
        required=True,
        help="bytes of one of P stages on one microbatch, on one device: residuals, "
        "wgrad_residuals (kept from I to W); message, workspace (default 0), "
        "pair_workspace (default workspace)",
    )
    add(
        "--memory",
        metavar="limit=80GiB,...",
        required=True,
        help="limit: bytes that a device may hold; and bytes of one of P stages on one "
        "device: parameters, gradients; at_rest (if not parameters), optimizer, other "
        "(default 0)",
    )
    add(
        "--remat",
        metavar="NAME:residuals=0.2GiB,...",
        action="append",
        default=[],
        help="a way to recompute; repeatable: bytes residuals, wgrad_residuals, "
        "workspace; cost (default F), overlapped_cost (of a pair, default cost)",
    )
    add("--schedules", metavar="NAME,...", help=f"of {', '.join(SCHEDULES)}")
    add("--measured-at", metavar="M", type=int, help="if not at the first M")
    for name, what in (
        ("task-overhead", "part of each task's cost that never shrinks"),
        ("update-time", "of gradient reduction and optimizer, once per training step"),
        (
            "exchange-time",
            "to bring one stage's parameters to another rank and gradients back",
        ),
    ):
        add(f"--{name}", metavar="T", type=float, default=0.0, help=what)
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the ranking; returns 1 if nothing fits."""
    held = _fields("--memory", args.memory, _HELD, required=_HELD[:3])
    activations = _fields(
        "--activations", args.activations, _ACTIVATIONS, required=_ACTIVATIONS[:2]
    )
    # In `simulate` these have defaults; here a wrong guess would give a wrong answer.
    given = {part.partition("=")[0].strip() for part in args.costs.split(",")}
    if missing := [name for name in "FIW" if name not in given]:
        raise ValueError(f"--costs lacks {', '.join(missing)}; give F, I and W.")
    limit = held.pop("limit")
    numbers = read_integers("--microbatches", args.microbatches)
    check_size(args.ranks, max(numbers))
    ranking = rank_schedules(
        args.ranks,
        numbers,
        parse_costs(args.costs),
        StageMemory(**activations, **held),
        limit=limit,
        remat=[_remat(text) for text in args.remat],
        schedules=args.schedules.split(",") if args.schedules else None,
        measured_at=args.measured_at,
        task_overhead=args.task_overhead,
        update_time=args.update_time,
        exchange_time=args.exchange_time,
    )
    print(json.dumps(ranking.to_dict()) if args.json else str(ranking))
    return int(ranking.best is None)


def _remat(text: str) -> Remat:
    name, _, rest = text.partition(":")
    fields = ("residuals", "wgrad_residuals", "workspace", *_COSTS)
    return Remat(name, **_fields("--remat", rest, fields, required=fields[:2]))


def _fields(
    option: str, text: str, names: tuple[str, ...], required: tuple[str, ...]
) -> dict[str, float]:
    """Reads `NAME=NUMBER,...`; bytes with a unit, costs without."""
    found: dict[str, float] = {}
    for name, part, number in read_fields(option, text, names):
        read: Callable[[str], float] = float if name in _COSTS else parse_bytes
        try:
            found[name] = read(number)
        except ValueError as error:
            raise ValueError(f"{option} {text!r}: {part!r}: {error}") from None
    if missing := [name for name in required if name not in found]:
        raise ValueError(f"{option} {text!r} lacks {', '.join(missing)}; give bytes.")
    return found
