"""Arguments that both commands take: the loads, and the cluster's sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

MAX_BYTES = 2**31
_LOADS = (
    "expert loads: what SGLang (.pt, .json), sglang-jax (.npy) or vLLM (.safetensors) "
    "records, or .npz or .npy of [layers, experts] or [windows, layers, experts]; "
    "several arrays of a file are windows"
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


def sizes_of(
    args: argparse.Namespace, num_layers: int, num_experts: int
) -> tuple[int, int, int, int]:
    """Returns num_replicas, num_groups, num_nodes and num_gpus, defaults filled in.

    Raises:
      ValueError: the maps of so many replicas would not fit into memory.
    """
    num_replicas = args.num_replicas
    if num_replicas is None:
        wanted, num_gpus = num_experts + -(-num_experts // 8), max(args.num_gpus, 1)
        num_replicas = -(-wanted // num_gpus) * num_gpus
    # Each expert has room for all replicas beyond one for each of the others.
    num_entries = num_replicas + num_experts * max(num_replicas - num_experts + 1, 0)
    if (num_bytes := 4 * num_layers * num_entries) > MAX_BYTES:
        raise ValueError(
            f"{num_replicas=} of {num_experts} experts in {num_layers} layers need "
            f"maps of {num_bytes / 1e9:,.1f} GB, more than {MAX_BYTES / 1e9:.1f}; use "
            "fewer replicas, or fewer GPUs."
        )
    return num_replicas, args.num_groups, args.num_nodes, args.num_gpus
