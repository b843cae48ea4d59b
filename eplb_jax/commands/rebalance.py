"""The command `rebalance`: one plan for recorded loads, measured and shown."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np

from eplb_jax import pictures
from eplb_jax.commands.arguments import add_cluster, sizes_of
from eplb_jax.files import (
    ENGINES,
    Recording,
    engine_of,
    read_loads,
    write_placement,
)
from eplb_jax.placement import (
    ExpertTables,
    Policy,
    balancedness,
    balancedness_bound,
    count_duplicates,
    home_nodes,
    rebalance_experts,
    remote_share,
)
from eplb_jax.recordings import in_order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`rebalance LOADS [--replicas S] [--gpus D] ... [--policy P] [--out FILE]`."""
    add_cluster(parser)
    parser.add_argument(
        "--policy",
        choices=get_args(Policy),
        default="auto",
        help="auto: upstream's choice of hierarchical or global; soft and swaps "
        "balance better (default: %(default)s)",
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
        help="write the maps: .npz; .json or .npy for SGLang's or sglang-jax's "
        "--init-expert-location; .yaml for TensorRT-LLM",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="that reads --out (default: by its name; .json may also be vllm-ascend's)",
    )
    parser.add_argument(
        "--first-layer",
        type=int,
        default=0,
        metavar="N",
        help="index in the model of the first recorded layer, if LOADS lacks the dense "
        "layers before it (default: %(default)s)",
    )
    parser.set_defaults(run=run)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A plan, its measures, and the layer to show.

    Attributes:
      policy: of the plan.
      capacity: [num_gpus] relative speeds, or None.
      num_groups: groups of experts.
      num_nodes: nodes.
      num_gpus: GPUs.
      weight: [layers, experts] loads.
      tables: the placement.
      loaded: the layers that have load.
      measures: for each measure its value for each of these layers.
      layer: to show.
    """

    policy: Policy
    capacity: np.ndarray | None
    num_groups: int
    num_nodes: int
    num_gpus: int
    weight: np.ndarray
    tables: ExpertTables
    loaded: np.ndarray
    measures: dict[str, np.ndarray]
    layer: int

    @property
    def placement(self) -> np.ndarray:
        return np.asarray(self.tables.physical_to_logical_map)

    @property
    def most_replicas(self) -> int:
        return int(np.asarray(self.tables.expert_count)[self.loaded].max())

    @property
    def num_duplicates(self) -> int:
        duplicates = count_duplicates(self.placement, self.num_gpus)
        return int(np.asarray(duplicates)[self.loaded].sum())


def run(args: argparse.Namespace) -> None:
    """Plans; writes and draws the plan, and prints it as a table or as JSON."""
    plan = _plan(args)
    if args.out:
        _write_maps(args, plan)
    if args.figure:
        figure = pictures.placement_figure(
            plan.weight[plan.layer],
            plan.placement[plan.layer],
            plan.num_nodes,
            plan.num_gpus,
            f"Layer {plan.layer}, policy {plan.policy}",
            plan.capacity,
        )
        figure.savefig(args.figure, dpi=150)
    print(json.dumps(_summary(plan), allow_nan=False) if args.json else _table(plan))


def _plan(args: argparse.Namespace) -> _Plan:
    weight = _weight(read_loads(args.loads), args.window)
    sizes = sizes_of(args, *weight.shape)
    _, num_groups, num_nodes, num_gpus = sizes
    loaded = np.flatnonzero((weight > 0).any(axis=1))
    if not loaded.size:
        raise ValueError(f"{args.loads} records no load at all.")
    layer = args.layer
    if layer is not None and not 0 <= layer < len(weight):
        raise ValueError(f"--layer {layer} is not one of {len(weight)} layers.")
    capacity = None if args.capacity is None else np.asarray(args.capacity)
    if args.first_layer < 0:
        raise ValueError(f"--first-layer {args.first_layer} must be at least 0.")
    if args.out:
        engine = engine_of(args.out, args.engine)
        if engine != "eplb-jax" and 0 in (args.capacity or []):
            raise ValueError(
                f"--out {args.out} is for servers that take -1, an empty physical "
                "expert, for the last expert, and a GPU with --capacity 0 has only "
                "such; use .npz, or plan for the GPUs that are alive."
            )
    tables = rebalance_experts(
        weight, *sizes, policy=args.policy, device_capacity=capacity
    )
    rows = _measure(weight, tables.physical_to_logical_map, sizes, capacity)
    measures = {name: np.asarray(row)[loaded] for name, row in rows.items()}
    if layer is None:
        layer = int(loaded[np.argmin(measures["with experts in order"])])
    return _Plan(
        policy=args.policy,
        capacity=capacity,
        num_groups=num_groups,
        num_nodes=num_nodes,
        num_gpus=num_gpus,
        weight=weight,
        tables=tables,
        loaded=loaded,
        measures=measures,
        layer=layer,
    )


def _weight(recording: Recording, window: str | None) -> np.ndarray:
    if window is None:
        with np.errstate(over="ignore"):
            total = recording.counts.sum(axis=0)
        if not np.isfinite(total).all():
            raise ValueError(
                "The windows' loads add up to more than a float64 holds; choose one "
                "with --window, or divide them."
            )
        return total
    if window not in recording.names:
        raise ValueError(
            f"--window {window} is not in the recording; it has "
            f"{', '.join(recording.names)}."
        )
    return recording.counts[recording.names.index(window)]


def _measure(
    weight: np.ndarray,
    placement: Any,
    sizes: tuple[int, int, int, int],
    capacity: np.ndarray | None,
) -> dict[str, Any]:
    num_replicas, num_groups, num_nodes, num_gpus = sizes
    trivial = in_order(len(weight), weight.shape[1], num_replicas)
    rows = {
        "balancedness": balancedness(weight, placement, num_gpus, capacity),
        "balancedness of nodes": balancedness(weight, placement, num_nodes),
        "with experts in order": balancedness(weight, trivial, num_gpus),
        "no placement exceeds": balancedness_bound(weight, num_replicas, num_gpus),
    }
    if capacity is not None:
        # Neither takes devices of different speed into account.
        del rows["balancedness of nodes"], rows["no placement exceeds"]
    if num_nodes > 1 and num_groups % num_nodes == 0:
        home = home_nodes(weight, num_groups, num_nodes)
        rows["load away from home"] = remote_share(weight, placement, home, num_nodes)
    return rows


def _lower_is_better(name: str) -> bool:
    """Tells whether the largest value of a measure is the worst."""
    return "away" in name


def _summary(plan: _Plan) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "policy": plan.policy,
        "layers": plan.loaded.tolist(),
        "num_experts": plan.tables.num_experts,
        "num_replicas": plan.tables.num_physical_experts,
        "num_groups": plan.num_groups,
        "num_nodes": plan.num_nodes,
        "num_gpus": plan.num_gpus,
        "max_replicas": plan.most_replicas,
        "duplicates": plan.num_duplicates,
    }
    for name, row in plan.measures.items():
        summary[name.replace(" ", "_")] = {
            "mean": float(row.mean()),
            "worst": float(row.max() if _lower_is_better(name) else row.min()),
            "layers": row.tolist(),
        }
    summary["physical_to_logical_map"] = plan.placement.tolist()
    return summary


def _table(plan: _Plan) -> str:
    tables, loaded = plan.tables, plan.loaded
    lines = [
        f"{tables.num_experts} experts, {tables.num_physical_experts} replicas on "
        f"{plan.num_gpus} GPUs of {plan.num_nodes} "
        f"node{'s' if plan.num_nodes > 1 else ''}, policy {plan.policy}; "
        f"{loaded.size} of {len(plan.weight)} layers have load",
        f"{'':24}{'mean':>8}{'worst layer':>22}",
    ]
    for name, row in plan.measures.items():
        at = row.argmax() if _lower_is_better(name) else row.argmin()
        where = f"(layer {loaded[at]})"
        lines.append(f"{name:24}{row.mean():8.3f}{row[at]:10.3f}{where:>12}")
    lines += [
        f"{'most replicas':24}{plan.most_replicas:8}",
        f"{'twice on a GPU':24}{plan.num_duplicates:8}",
        f"\nLayer {plan.layer} (* has several replicas)",
        pictures.placement_text(
            plan.weight[plan.layer],
            plan.placement[plan.layer],
            plan.num_nodes,
            plan.num_gpus,
            plan.capacity,
        ),
    ]
    return "\n".join(lines)


def _write_maps(args: argparse.Namespace, plan: _Plan) -> None:
    # Other engines know layers by their place in the model; those without load are
    # dense.
    is_ours = engine_of(args.out, args.engine) == "eplb-jax"
    rows = np.arange(len(plan.weight)) if is_ours else plan.loaded
    write_placement(
        args.out,
        plan.placement[rows],
        engine=args.engine,
        layers=(rows + args.first_layer).tolist(),
        num_layers=len(plan.weight) + args.first_layer,
        num_devices=plan.num_gpus,
    )
