"""The command line: `python -m dualpipe_jax COMMAND ...`.

A command is a function that adds its arguments to a parser, and a `run(args)` that
returns the exit status. `COMMANDS` names these functions by text, so that a command
loads what it needs, and jax only if it needs jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dualpipe_jax import show
from dualpipe_jax._picture import title_of
from dualpipe_jax.generators.names import SCHEDULES
from dualpipe_jax.schedule import Schedule
from dualpipe_jax.simulator import Costs, Timeline, simulate


class Command(NamedTuple):
    """Where a command lives, and what it does in a few words.

    Attributes:
      target: `module:function`; function(parser) adds the arguments. What runs is
        the `handler` that it sets with `parser.set_defaults`, or else the module's
        `run`: a function of the parsed arguments that returns the exit status.
      help: one line for the list of commands.
    """

    target: str
    help: str


COMMANDS = {
    "train": Command(
        "dualpipe_jax.train.cli:add_arguments",
        "train a language model, as a config says",
    ),
    "serve": Command(
        "dualpipe_jax.deepseek.serve.cli:add_arguments",
        "complete prompts with a model that train has trained",
    ),
    "report": Command(
        "dualpipe_jax.train.report_cli:add_arguments",
        "a training run as one page of HTML",
    ),
    "overlap": Command(
        "dualpipe_jax.overlap.cli:add_arguments",
        "what of a compiled step's communication runs under compute",
    ),
    "memory": Command(
        "dualpipe_jax._memory_cli:add_arguments",
        "what a train step needs of a GPU's memory, and for what",
    ),
    "schedule": Command(
        "dualpipe_jax.cli:schedule_command", "draw a schedule, or export it"
    ),
    "simulate": Command(
        "dualpipe_jax.cli:simulate_command", "makespan, bubbles and activations"
    ),
    "trace": Command(
        "dualpipe_jax._trace_cli:add_arguments",
        "what a profile says of the overlap: PyTorch's, JAX's, or our own",
    ),
    "bubbles": Command(
        "dualpipe_jax._bubbles_cli:add_arguments",
        "the schedules' bubbles over the number of microbatches",
    ),
    "choose": Command(
        "dualpipe_jax._choose_cli:add_arguments",
        "rank the schedules by step time under a memory limit, and say why",
    ),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(
        prog="python -m dualpipe_jax",
        description="DeepSeek's DualPipe for JAX.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    try:
        for name, command in COMMANDS.items():
            # Only the command that is asked for is loaded.
            subparser = commands.add_parser(name, help=command.help)
            if argv[:1] == [name]:
                subparser.description = command.help.capitalize() + "."
                _add_arguments(subparser, command.target)
        args = parser.parse_args(argv)
        status = args.handler(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever reads has read enough; Python must not complain when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        name = " ".join([parser.prog, *argv[:1]])
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _add_arguments(parser: argparse.ArgumentParser, target: str) -> None:
    module_name, _, function = target.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, function)(parser)
    if parser.get_default("handler") is None:
        parser.set_defaults(handler=module.run)


def schedule_command(parser: argparse.ArgumentParser) -> None:
    """`schedule KIND --ranks P --microbatches M [--format ...] [--out FILE]`."""
    _add_schedule_arguments(parser)
    _add_lowered(parser)
    parser.add_argument(
        "--format",
        choices=list(show.FORMATS),
        help="default: what FILE's suffix says, or text",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: stdout")
    parser.set_defaults(handler=_run_schedule)


def _run_schedule(args: argparse.Namespace) -> int:
    schedule, costs = _schedule(args), parse_costs(args.costs)
    timeline = simulate(schedule, costs)
    if args.lowered:
        from dualpipe_jax.lowering import lower

        timeline = simulate(lower(schedule), costs)
    if args.out is not None:
        show.save(timeline, args.out, args.format)
        return 0
    if args.format == "png":
        raise ValueError("--format png is binary; name a file with --out.")
    print(show.FORMATS[args.format or "text"](timeline), end="")
    return 0


def simulate_command(parser: argparse.ArgumentParser) -> None:
    """`simulate KIND --ranks P --microbatches M [--costs ...] [--lowered] [--json]`."""
    _add_schedule_arguments(parser)
    _add_lowered(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(handler=_run_simulate)


def _run_simulate(args: argparse.Namespace) -> int:
    schedule, costs = _schedule(args), parse_costs(args.costs)
    timeline = simulate(schedule, costs)
    program = {}
    if args.lowered:
        from dualpipe_jax.lowering import lower

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


def parse_costs(text: str) -> Costs:
    """Reads `F=97,I=104,...`; what is not named has the default of `Costs`.

    Raises:
      ValueError: a part is not NAME=NUMBER, or a name is unknown or given twice.

    Examples:
      >>> parse_costs("F=2,p2p=0.5")
      Costs(F=2.0, I=1.0, W=1.0, B=2.0, FB=4.0, p2p=0.5)
    """
    names = [field.name for field in dataclasses.fields(Costs)]
    costs: dict[str, float] = {}
    for name, part, number in read_fields("--costs", text, names):
        try:
            costs[name] = float(number)
        except ValueError:
            raise ValueError(
                f"--costs {text!r}: {part!r} has no number; write {name}=1.5."
            ) from None
    return Costs(**costs)


def read_fields(
    option: str, text: str, names: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Takes `NAME=VALUE,...` apart: yields (name, the part as it stands, value).

    Raises:
      ValueError: a name is not among `names`, or is given twice.
    """
    found: set[str] = set()
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        if name not in names or name in found:
            problem = "given twice" if name in found else "unknown"
            raise ValueError(
                f"{option} {text!r}: {name!r} is {problem}; give each of "
                f"{', '.join(names)} at most once."
            )
        found.add(name)
        yield name, part, value


def _add_lowered(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lowered",
        action="store_true",
        help="simulate the lowered program, with the waits that its permutes cause",
    )


def read_integers(option: str, text: str) -> list[int]:
    """Reads `16,32`.

    Raises:
      ValueError: a part is no integer.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be such as 16 or 16,32.") from None


def _add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        metavar="KIND",
        help=f"{', '.join(SCHEDULES)}, or the path of a .csv file",
    )
    parser.add_argument("--ranks", metavar="P", type=int, help="size of the pipeline")
    parser.add_argument(
        "--microbatches", metavar="M", type=int, help="of one training step"
    )
    parser.add_argument(
        "--costs",
        default="",
        metavar="F=97,I=104,...",
        help="of F, I, W, B (default I+W), FB (default F+B) and p2p; default 1, p2p 0",
    )


def _schedule(args: argparse.Namespace) -> Schedule:
    sizes = {"--ranks": args.ranks, "--microbatches": args.microbatches}
    if args.kind.endswith(".csv"):
        given = [name for name, size in sizes.items() if size is not None]
        if given:
            raise ValueError(f"A CSV has its own sizes; leave out {given[0]}.")
        path = Path(args.kind)
        return Schedule.from_csv(path.read_text(encoding="utf-8"), kind=path.stem)
    if args.kind not in SCHEDULES:
        raise ValueError(
            f"KIND={args.kind!r} is unknown; use one of {', '.join(SCHEDULES)}, or a "
            "path that ends in .csv."
        )
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise ValueError(f"{args.kind} needs {' and '.join(missing)}.")
    return SCHEDULES[args.kind](args.ranks, args.microbatches)
