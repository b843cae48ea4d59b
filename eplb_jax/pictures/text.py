"""Placements and replays as text.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import itertools
from typing import Any

from eplb_jax.pictures.layer import count_by_expert, read_layer
from eplb_jax.recordings import Outcome


def placement_text(
    weight: Any,
    physical_to_logical_map: Any,
    num_nodes: int,
    num_devices: int,
    device_capacity: Any = None,
) -> str:
    """Formats one layer's placement: each device's load in percent of its share.

    Args:
      weight: [experts] loads.
      physical_to_logical_map: [physical experts] int32, -1 if empty.
      num_nodes: nodes.
      num_devices: devices.
      device_capacity: [num_devices] relative speeds, 0 for a dead device.

    Returns:
      Lines of text, one per device. A `*` marks experts with more than one replica.

    Examples:
      >>> print(placement_text([6, 2, 1, 3], [0, 1, 2, 0, 3, -1], 1, 2))
      node  gpu    load  experts
         0    0   100 %  0*   1   2
         0    1   100 %  0*   3   -
    """
    weight_E, expert_DI, used_DI = read_layer(
        weight, physical_to_logical_map, num_devices, device_capacity
    )
    count_E = count_by_expert(expert_DI, len(weight_E))
    digits = len(str(len(weight_E) - 1))
    lines = ["node  gpu    load  experts"]
    for device, expert_I in enumerate(expert_DI):
        cells = []
        for expert in expert_I:
            name = "-" if expert < 0 else str(expert)
            star = "*" if expert >= 0 and count_E[expert] > 1 else " "
            cells.append(f"{name:>{digits}}{star}")
        node = device // (num_devices // num_nodes)
        percent = f"{100 * used_DI[device].sum():.0f} %"
        lines.append(f"{node:4} {device:4} {percent:>7}  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def replay_text(names: tuple[str, ...], outcomes: dict[str, Outcome]) -> str:
    """Formats a replay as a table: balancedness, and the percentage of replicas moved.

    Args:
      names: names of the windows.
      outcomes: from `replay`.

    Returns:
      Lines of text.

    Examples:
      >>> import numpy as np
      >>> outcome = Outcome(np.array([0.5]), np.array([0.25]), np.array([0.125]))
      >>> print(replay_text(("a", "b"), {"once": outcome}))
      planned on -> met            once
      a -> b               0.500  12 %
      mean                 0.500  12 %
      worst layer          0.250
    """
    steps = [f"{old} -> {new}" for old, new in itertools.pairwise(names)]
    width = max(len(step) for step in (*steps, "planned on -> met")) + 2
    lines = [f"{'planned on -> met':{width}}"]
    lines[0] += "".join(f"{name:>14}" for name in outcomes)
    for i, step in enumerate(steps):
        line = f"{step:{width}}"
        for outcome in outcomes.values():
            line += f"{outcome.balancedness[i]:>8.3f}{100 * outcome.moved[i]:>4.0f} %"
        lines.append(line)
    line = f"{'mean':{width}}"
    for outcome in outcomes.values():
        line += f"{outcome.balancedness.mean():>8.3f}"
        line += f"{100 * outcome.moved.mean():>4.0f} %"
    lines.append(line)
    line = f"{'worst layer':{width}}"
    for outcome in outcomes.values():
        line += f"{outcome.worst.min():>8.3f}      "
    return "\n".join([*lines, line.rstrip()])
