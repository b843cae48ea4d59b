"""Arguments that both commands take: the loads, and the cluster's sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

_LOADS = (
    "expert loads: .npz or .npy of [layers, experts] or [windows, layers, experts], "
    "or JSON with logical_count, as SGLang records it; several arrays of an .npz are "
    "windows"
)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Adds LOADS, the cluster's sizes, and the forms of output."""
    parser.add_argument("loads", metavar="LOADS", help=_LOADS)
    parser.add_argument(
        "--num-replicas",
        "--replicas",
        type=int,
        help="physical experts per layer (default: at least an eighth more than "
        "experts)",
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


def sizes_of(args: argparse.Namespace, num_experts: int) -> tuple[int, int, int, int]:
    """Returns num_replicas, num_groups, num_nodes and num_gpus, defaults filled in."""
    num_replicas = args.num_replicas
    if num_replicas is None:
        wanted, num_gpus = num_experts + -(-num_experts // 8), max(args.num_gpus, 1)
        num_replicas = -(-wanted // num_gpus) * num_gpus
    return num_replicas, args.num_groups, args.num_nodes, args.num_gpus
