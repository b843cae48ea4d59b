"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from dualpipe_jax.schedules import Costs, Schedule
from dualpipe_jax.schedules.generators import (
    SCHEDULES,
    check_size,
    with_stages_per_rank,
)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all other errors here."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_costs(text: str) -> Costs:
    """Reads `F=97,I=104,...`; costs that are not named have their default.

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
    """Splits `NAME=VALUE,...`; yields (name, the part as written, value).

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


def add_lowered(parser: argparse.ArgumentParser) -> None:
    """Adds `--lowered`."""
    parser.add_argument(
        "--lowered",
        action="store_true",
        help="simulate the lowered program, including the waits its permutes cause",
    )


def add_no_cache(parser: argparse.ArgumentParser) -> None:
    """Adds `--no-cache`."""
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compile everything again, and keep nothing for the next time",
    )


def read_integers(option: str, text: str) -> list[int]:
    """Reads `16,32`.

    Raises:
      ValueError: a part is not an integer.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} {text!r} must be integers; write 16 or 16,32."
        ) from None


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `KIND --ranks P --microbatches M [--stages-per-rank V] [--costs ...]`."""
    parser.add_argument(
        "kind",
        metavar="KIND",
        help=f"{', '.join(SCHEDULES)}, or the path of a .csv or .json file",
    )
    parser.add_argument("--ranks", metavar="P", type=int, help="size of the pipeline")
    parser.add_argument(
        "--microbatches", metavar="M", type=int, help="of one training step"
    )
    parser.add_argument(
        "--stages-per-rank",
        metavar="V",
        type=int,
        help="of an interleaved schedule or looped_bfs (default 2)",
    )
    parser.add_argument(
        "--costs",
        default="",
        metavar="F=97,I=104,...",
        help="of F, I, W, B (default I+W), FB (default F+B) and p2p; default 1, p2p 0",
    )


def read_schedule(args: argparse.Namespace) -> Schedule:
    """Returns the schedule that KIND, its ranks, microbatches and stages name.

    Raises:
      ValueError: it does not exist, or the file does not hold a schedule.
    """
    sizes = {"--ranks": args.ranks, "--microbatches": args.microbatches}
    path = Path(args.kind)
    if path.suffix in (".csv", ".json"):
        every = sizes | {"--stages-per-rank": args.stages_per_rank}
        given = [name for name, size in every.items() if size is not None]
        if given:
            raise ValueError(f"A file has its own sizes; leave out {given[0]}.")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return Schedule.from_json(text)
        return Schedule.from_csv(text, kind=path.stem)
    if args.kind not in SCHEDULES:
        raise ValueError(
            f"KIND={args.kind!r} is unknown; use one of {', '.join(SCHEDULES)}, or a "
            "path that ends in .csv or .json."
        )
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise ValueError(f"{args.kind} needs {' and '.join(missing)}.")
    make = with_stages_per_rank(args.kind, args.stages_per_rank)
    check_size(args.ranks, args.microbatches, args.stages_per_rank or 1)
    return make(args.ranks, args.microbatches)
