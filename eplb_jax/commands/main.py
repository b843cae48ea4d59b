"""The command line: `python -m eplb_jax rebalance LOADS` and `replay LOADS`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from eplb_jax import pictures
from eplb_jax.placement import (
    Policy,
    balancedness,
    balancedness_bound,
    count_duplicates,
    home_nodes,
    rebalance_experts,
    remote_share,
)
from eplb_jax.recordings import Recording, in_order, read_loads, replay

_LOADS = (
    "expert loads: .npz or .npy of [layers, experts] or [windows, layers, experts], "
    "or JSON with logical_count, as SGLang records it; several arrays of an .npz are "
    "windows"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments after the program's name; None: those of this process.

    Returns:
      The exit status: 2 for bad input.
    """
    parser = _Parser(
        prog="python -m eplb_jax", description="Expert load balancing for JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_rebalance(commands.add_parser("rebalance", help="plan a placement, show it"))
    _add_replay(
        commands.add_parser(
            "replay", help="plan on each recorded window, score on the next"
        )
    )
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, ImportError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_rebalance(parser: argparse.ArgumentParser) -> None:
    _add_cluster(parser)
    parser.add_argument(
        "--policy",
        choices=get_args(Policy),
        default="auto",
        help="auto: upstream's choice of hierarchical or global; soft and swaps are "
        "better balanced (default: %(default)s)",
    )
    parser.add_argument(
        "--window", help="name of the one window to plan for (default: their sum)"
    )
    parser.add_argument(
        "--capacity",
        type=float,
        nargs="+",
        metavar="SPEED",
        help="relative speed of each GPU, 0 for a dead one; for soft and swaps",
    )
    parser.add_argument(
        "--layer",
        type=int,
        help="layer to show (default: the one with most to gain)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write the maps: .npz, or .json for SGLang's --init-expert-location",
    )
    parser.set_defaults(run=_rebalance)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    _add_cluster(parser)
    parser.add_argument(
        "--policy",
        choices=get_args(Policy),
        default="swaps",
        help="of the first plan (default: %(default)s)",
    )
    parser.add_argument(
        "--max-moves",
        type=int,
        help="slots of a layer that refining may change in a window (default: a sixth)",
    )
    parser.set_defaults(run=_replay)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("loads", metavar="LOADS", help=_LOADS)
    parser.add_argument(
        "--num-replicas",
        "--replicas",
        type=int,
        help="slots of a layer (default: an eighth more than experts, rounded up)",
    )
    for name, what, default in (
        ("groups", "groups of experts", 1),
        ("nodes", "nodes", 1),
        ("gpus", "GPUs", 8),
    ):
        parser.add_argument(
            f"--num-{name}",
            f"--{name}",
            type=int,
            default=default,
            help=f"{what} (default: %(default)s)",
        )
    parser.add_argument("--figure", type=Path, help="draw it: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON only")


def _sizes(args: argparse.Namespace, num_experts: int) -> tuple[Any, ...]:
    num_replicas = args.num_replicas
    if num_replicas is None:
        wanted, num_gpus = num_experts + -(-num_experts // 8), max(args.num_gpus, 1)
        num_replicas = -(-wanted // num_gpus) * num_gpus
    return num_replicas, args.num_groups, args.num_nodes, args.num_gpus


def _weight(recording: Recording, window: str | None) -> np.ndarray:
    if window is None:
        return recording.counts.sum(axis=0)
    if window not in recording.names:
        raise ValueError(
            f"--window {window} is not in the recording; it has "
            f"{', '.join(recording.names)}."
        )
    return recording.counts[recording.names.index(window)]


def _rebalance(args: argparse.Namespace) -> None:
    weight = _weight(read_loads(args.loads), args.window).astype(np.float32)
    sizes = _sizes(args, weight.shape[1])
    num_replicas, num_groups, num_nodes, num_gpus = sizes
    loaded = np.flatnonzero(weight.sum(axis=1) > 0)
    if not loaded.size:
        raise ValueError(f"{args.loads} records no load at all.")
    layer = args.layer
    if layer is not None and not 0 <= layer < len(weight):
        raise ValueError(f"--layer {layer} is not one of {len(weight)} layers.")
    if args.out and args.out.suffix not in (".npz", ".json"):
        raise ValueError(f"--out {args.out} must end in .npz or .json.")
    maps = rebalance_experts(
        weight, *sizes, policy=args.policy, device_capacity=args.capacity
    )
    placement = np.asarray(maps.physical_to_logical_map)
    num_layers, num_experts = weight.shape
    trivial = in_order(num_layers, num_experts, num_replicas)
    rows = {
        "balancedness": balancedness(weight, placement, num_gpus, args.capacity),
        "balancedness of nodes": balancedness(weight, placement, num_nodes),
        "with experts in order": balancedness(weight, trivial, num_gpus),
        "no placement exceeds": balancedness_bound(weight, num_replicas, num_gpus),
    }
    if args.capacity is not None:
        # Neither says anything about devices of different speed.
        del rows["balancedness of nodes"], rows["no placement exceeds"]
    if num_nodes > 1 and num_groups % num_nodes == 0:
        home = home_nodes(weight, num_groups, num_nodes)
        rows["load away from home"] = remote_share(weight, placement, home, num_nodes)
    table = {name: np.asarray(row)[loaded] for name, row in rows.items()}
    twice = np.asarray(count_duplicates(placement, num_gpus))[loaded]
    most = int(np.asarray(maps.expert_count)[loaded].max())
    if layer is None:
        layer = int(loaded[np.argmin(table["with experts in order"])])
    if args.out:
        _write_maps(args.out, maps)
    if args.figure:
        figure = pictures.placement_figure(
            weight[layer],
            placement[layer],
            num_nodes,
            num_gpus,
            f"Layer {layer}, policy {args.policy}",
            args.capacity,
        )
        figure.savefig(args.figure, dpi=150)
    if args.json:
        summary: dict[str, Any] = {
            "policy": args.policy,
            "layers": loaded.tolist(),
            "num_experts": weight.shape[1],
            "num_replicas": num_replicas,
            "num_groups": num_groups,
            "num_nodes": num_nodes,
            "num_gpus": num_gpus,
            "max_replicas": most,
            "duplicates": int(twice.sum()),
        }
        for name, row in table.items():
            key = name.replace(" ", "_")
            summary[key] = {
                "mean": float(row.mean()),
                "worst": float(row.max() if "away" in name else row.min()),
                "layers": row.tolist(),
            }
        summary["physical_to_logical_map"] = placement.tolist()
        print(json.dumps(summary))
        return
    print(
        f"{weight.shape[1]} experts in {num_replicas} slots of {num_gpus} GPUs on "
        f"{num_nodes} node{'s' if num_nodes > 1 else ''}, policy {args.policy}; "
        f"{loaded.size} of {len(weight)} layers have load"
    )
    print(f"{'':24}{'mean':>8}{'worst layer':>22}")
    for name, row in table.items():
        at = row.argmax() if "away" in name else row.argmin()
        where = f"(layer {loaded[at]})"
        print(f"{name:24}{row.mean():8.3f}{row[at]:10.3f}{where:>12}")
    print(f"{'most replicas':24}{most:8}")
    print(f"{'twice on a GPU':24}{twice.sum():8}")
    print(f"\nLayer {layer} (* has several replicas)")
    print(
        pictures.placement_text(
            weight[layer], placement[layer], num_nodes, num_gpus, args.capacity
        )
    )


def _replay(args: argparse.Namespace) -> None:
    recording = read_loads(args.loads)
    sizes = _sizes(args, recording.counts.shape[2])
    outcomes = replay(
        recording.counts, *sizes, policy=args.policy, max_moves=args.max_moves
    )
    if args.figure:
        figure = pictures.replay_figure(recording.names, outcomes)
        figure.savefig(args.figure, dpi=150)
    if args.json:
        strategies = {
            name: {field: row.tolist() for field, row in outcome._asdict().items()}
            for name, outcome in outcomes.items()
        }
        print(json.dumps({"windows": recording.names, "strategies": strategies}))
        return
    print(pictures.replay_text(recording.names, outcomes))


def _write_maps(path: Path, maps: Any) -> None:
    arrays = {name: np.asarray(array) for name, array in maps._asdict().items()}
    if path.suffix == ".json":
        placement = arrays["physical_to_logical_map"].tolist()
        path.write_text(json.dumps({"physical_to_logical_map": placement}))
    else:
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
