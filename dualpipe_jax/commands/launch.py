"""`python -m dualpipe_jax launch`: starts and watches the processes of one machine."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys

from dualpipe_jax.commands import train
from dualpipe_jax.commands.arguments import OneLineParser
from dualpipe_jax.processes import Launch, Layout, Machines, local_gpus
from dualpipe_jax.train import LAUNCHES, for_children, newest_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `launch` to a command's parser."""
    parser.usage = (
        f"{parser.prog} [-h] --processes N [options] -- train CONFIG [train's options]"
    )
    parser.add_argument(
        "--processes",
        type=int,
        required=True,
        metavar="N",
        help="of this machine; its GPUs are divided among them",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="R",
        help="how often in a row the run may lose a process without a new checkpoint "
        "(%(default)s)",
    )
    parser.add_argument(
        "--fallback",
        nargs="+",
        default=[],
        metavar="MESH",
        help="meshes to continue on, in this order, once these are spent or there are "
        "too few GPUs: pp=2,ep=2",
    )
    several = parser.add_argument_group(
        "several machines",
        "start the same command once on each; starting them again is left to the "
        "cluster",
    )
    several.add_argument("--nodes", type=int, default=1, metavar="K", help="machines")
    several.add_argument(
        "--node", type=int, default=0, metavar="I", help="this one, from 0"
    )
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of machine 0, at a free port"
    )
    several.add_argument(
        "--slurm", action="store_true", help="take these three from Slurm's environment"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Runs the job that `add_arguments` describes.

    Returns:
      The run's exit status; 75 if processes were lost and no restart is left.

    Raises:
      ValueError: bad input, before anything is started.
    """
    rest = args.command[1:] if args.command[:1] == ["--"] else args.command
    if rest[:1] != ["train"]:
        raise ValueError(
            f"the command {' '.join(rest)!r} must be `train CONFIG ...`; give it after "
            "`--`."
        )
    options = _parsed(rest[1:])
    config = train.configured(options)
    folder = train.folder_of(options, config)
    layouts = [Layout("", config.num_devices)]
    for text in args.fallback:
        smaller = dataclasses.replace(config, mesh=train.parse_mesh(text))
        smaller.make_schedule()
        layouts.append(Layout(text, smaller.num_devices))

    def say(line: str) -> None:
        print(f"launch: {line}", file=sys.stderr, flush=True)

    def remember(line: str) -> None:
        now = datetime.datetime.now(datetime.UTC)
        record = {"time": f"{now:%Y-%m-%d %H:%M:%S} UTC", "event": line}
        try:
            with (folder / LAUNCHES).open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # the run is worth more than its record
            say(f"could not be recorded in {folder}: {error}")

    machines = Machines(args.nodes, args.node, args.coordinator)
    if args.slurm:
        if machines != Machines():
            raise ValueError(
                "--slurm takes all from Slurm's environment; leave it out, or leave "
                "out --nodes, --node and --coordinator."
            )
        machines = Machines.of_slurm()
    environment = {}
    if machines.count == 1 and not options.no_cache:
        environment = for_children(say)
    return Launch(
        command=[sys.executable, "-m", "dualpipe_jax", *rest],
        num_processes=args.processes,
        layouts=layouts,
        restarts=args.restarts,
        saved=lambda: newest_checkpoint(folder),
        say=say,
        remember=remember,
        machines=machines,
        environment=environment,
        gpus=lambda: None if config.platform == "cpu" else local_gpus(),
    ).run()


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """Train's own arguments, without those that are the launcher's to give."""
    parser = OneLineParser(prog="launch ... -- train")
    train.add_arguments(parser)
    options = parser.parse_args(arguments)
    for name in ("coordinator", "num_processes", "process_id", "distributed"):
        if getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is launch's to give; leave it out after `--`, and give "
                "--coordinator before it if there are several machines."
            )
    return options
