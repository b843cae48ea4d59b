"""The command `replay`: recorded windows, planned on one and scored on the next."""

from __future__ import annotations

import argparse
import json
from typing import get_args

from eplb_jax import files, pictures, recordings
from eplb_jax.commands.arguments import add_cluster, sizes_of
from eplb_jax.placement import Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`replay LOADS [--replicas S] [--gpus D] ... [--policy P] [--max-moves M]`."""
    add_cluster(parser)
    parser.add_argument(
        "--policy",
        choices=get_args(Policy),
        default="swaps",
        help="of the first plan (default: %(default)s)",
    )
    parser.add_argument(
        "--max-moves",
        type=int,
        help="physical experts that refining may move per layer and window (default: a "
        "sixth)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the strategies' outcomes as a table or as JSON, and draws them."""
    recording = files.read_loads(args.loads)
    sizes = sizes_of(args, *recording.counts.shape[1:])
    outcomes = recordings.replay(
        recording.counts, *sizes, policy=args.policy, max_moves=args.max_moves
    )
    names = recordings.with_load(recording).names
    if args.figure:
        figure = pictures.replay_figure(names, outcomes)
        figure.savefig(args.figure, dpi=150)
    if args.json:
        strategies = {
            name: {field: row.tolist() for field, row in outcome._asdict().items()}
            for name, outcome in outcomes.items()
        }
        result = {"windows": names, "strategies": strategies}
        print(json.dumps(result, allow_nan=False))
    else:
        print(pictures.replay_text(names, outcomes))
