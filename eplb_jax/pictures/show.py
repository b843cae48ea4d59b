"""Placements and replays as text and as pictures.

Pictures need matplotlib (`pip install dualpipe-jax[viz]`), which is imported when one
is drawn.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from eplb_jax import style
from eplb_jax.placement import balancedness, physical_expert_loads
from eplb_jax.recordings import Outcome, in_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DEVICES_PER_ROW = 40
_GAP = 0.6


def placement_text(
    weight: Any,
    physical_to_logical_map: Any,
    num_nodes: int,
    num_devices: int,
    device_capacity: Any = None,
) -> str:
    """Prints one layer's placement: each device's load in percent of its share.

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
    weight_E, expert_DI, used_DI = _layer(
        weight, physical_to_logical_map, num_devices, device_capacity
    )
    count_E = _counts(expert_DI, len(weight_E))
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


def placement_figure(
    weight: Any,
    physical_to_logical_map: Any,
    num_nodes: int,
    num_devices: int,
    title: str = "",
    device_capacity: Any = None,
) -> Figure:
    """Draws one layer's placement as in upstream's README: nodes, devices and loads.

    Above, the load of each device, stacked by physical expert, and its load with
    experts in order; below, the physical experts. Each expert with more than one
    replica has its own colour.

    Args:
      weight: [experts] loads.
      physical_to_logical_map: [physical experts] int32, -1 if empty.
      num_nodes: nodes.
      num_devices: devices.
      title: above the picture.
      device_capacity: [num_devices] relative speeds, 0 for a dead device.

    Returns:
      A matplotlib `Figure`; save it with `figure.savefig(path)`.

    Examples:
      >>> figure = placement_figure([6, 2, 1, 3], [0, 1, 2, 0, 3, 1], 1, 2)
      >>> len(figure.axes)
      2
    """
    weight_E, expert_DI, used_DI = _layer(
        weight, physical_to_logical_map, num_devices, device_capacity
    )
    before_S = in_order(1, len(weight_E), expert_DI.size)[0]
    before_D = _layer(weight_E, before_S, num_devices)[2].sum(axis=1)
    colors = _colors(expert_DI, len(weight_E))
    per_device, per_node = expert_DI.shape[1], num_devices // num_nodes
    per_row = min(num_devices, per_node * max(1, _DEVICES_PER_ROW // per_node))
    if per_node > _DEVICES_PER_ROW:
        per_row = _DEVICES_PER_ROW
    num_rows = -(-num_devices // per_row)
    length = per_row + _GAP * (-(-per_row // per_node) - 1) + 0.6
    width = float(np.clip(0.42 * length, 6.5, 22))
    cell = width / length
    cells_height = float(np.clip(per_device * cell * 0.75, 0.6, 8)) + 0.5
    figure = style.figure(width, num_rows * (cells_height + 2.4) + 0.8)
    every_axes = style.axes(
        figure, 2 * num_rows, height_ratios=[2.4, cells_height] * num_rows
    )
    top_of_loads = 1.08 * max(used_DI.sum(axis=1).max(), before_D.max(), 1)
    for row in range(num_rows):
        device_D = np.arange(row * per_row, min((row + 1) * per_row, num_devices))
        # A gap between nodes, to show them at a glance.
        x_D = (
            device_D
            - device_D[0]
            + _GAP * (device_D // per_node - device_D[0] // per_node)
        )
        top, bottom = every_axes[2 * row : 2 * row + 2]
        _draw_loads(
            top, x_D, before_D[device_D], used_DI[device_D], expert_DI[device_D], colors
        )
        _draw_experts(
            bottom, x_D, device_D, per_node, expert_DI[device_D], colors, cell
        )
        top.set_ylim(0, top_of_loads)
        for axes in (top, bottom):
            axes.set_xlim(-0.8, length - 0.8)
    style.legend(every_axes[0], loc="upper right")
    every_axes[-1].set_xlabel(
        "GPU   (colours: experts with several replicas; grey: with one)"
    )
    placement = expert_DI.reshape(1, -1)
    now = balancedness(weight_E[None], placement, num_devices, device_capacity)
    was = balancedness(weight_E[None], before_S[None], num_devices)
    style.heading(
        figure,
        f"{title}{': ' if title else ''}balancedness {float(now[0]):.3f}, "
        f"{float(was[0]):.3f} with experts in order",
    )
    return figure


def _draw_loads(
    axes: Any,
    x_D: np.ndarray,
    before_D: np.ndarray,
    used_DI: np.ndarray,
    expert_DI: np.ndarray,
    colors: dict[int, str],
) -> None:
    floor_D = np.zeros(len(x_D))
    for used_D, expert_D in zip(used_DI.T, expert_DI.T, strict=True):
        color = [colors[expert] for expert in expert_D]
        axes.bar(
            x_D,
            used_D,
            0.78,
            floor_D,
            color=color,
            edgecolor=style.PAPER,
            linewidth=0.5,
        )
        floor_D += used_D
    # The load with experts in order, drawn over the bars, which often are higher.
    over = np.maximum(before_D, floor_D)
    axes.vlines(x_D, floor_D, over, color=style.FAINT, linewidth=0.8, linestyle=":")
    axes.hlines(
        before_D, x_D - 0.46, x_D + 0.46, color=style.INK, linewidth=1.4,
        label="experts in order",
    )  # fmt: skip
    axes.axhline(1, color=style.FAINT, linewidth=0.8, zorder=0.5)
    axes.set_ylabel("load of the GPU\n(fair share = 1)")
    axes.set_xticks([])


def _draw_experts(
    axes: Any,
    x_D: np.ndarray,
    device_D: np.ndarray,
    per_node: int,
    expert_DI: np.ndarray,
    colors: dict[int, str],
    cell: float,
) -> None:
    from matplotlib.patches import Rectangle

    per_device = expert_DI.shape[1]
    font = float(np.clip(72 * cell * 0.30, 4, 9))
    for x, expert_I in zip(x_D, expert_DI, strict=True):
        for i, expert in enumerate(expert_I):
            face = colors[expert]
            axes.add_patch(
                Rectangle(
                    (x - 0.46, i - 0.44), 0.92, 0.88, facecolor=face,
                    edgecolor=style.GRID, linewidth=0.4,
                )
            )  # fmt: skip
            if expert >= 0:
                axes.text(
                    x, i, str(expert), ha="center", va="center", fontsize=font,
                    color=style.ink_on(face),
                )  # fmt: skip
    for node in np.unique(device_D // per_node):
        x_of_node = x_D[device_D // per_node == node]
        axes.text(
            x_of_node.mean(), -0.72, f"node {node}", ha="center", va="bottom",
            fontsize=style.TEXT, color=style.INK,
        )  # fmt: skip
    axes.set_ylim(per_device - 0.5, -1.3)
    axes.set_yticks([])
    axes.set_ylabel("physical experts")
    axes.set_xticks(x_D, [str(device) for device in device_D])
    axes.spines[:].set_visible(False)


def replay_text(names: tuple[str, ...], outcomes: dict[str, Outcome]) -> str:
    """Prints a replay as a table: balancedness, and the percentage of replicas moved.

    Args:
      names: names of the windows.
      outcomes: from `replay`.

    Returns:
      Lines of text.

    Examples:
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


def _layer(
    weight: Any,
    physical_to_logical_map: Any,
    num_devices: int,
    device_capacity: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns loads, experts, and each one's fraction of its device's fair share."""
    weight_E = np.asarray(weight, np.float32)
    expert_S = np.asarray(physical_to_logical_map, np.int32)
    if weight_E.ndim != 1 or expert_S.ndim != 1 or expert_S.size % num_devices:
        raise ValueError(
            f"weight has shape {weight_E.shape} and physical_to_logical_map "
            f"{expert_S.shape}, but one layer is shown: pass [experts] and [physical "
            f"experts], a multiple of {num_devices=}."
        )
    load_S = np.asarray(
        physical_expert_loads(jnp.asarray(weight_E[None]), jnp.asarray(expert_S[None]))
    )[0]
    capacity_D = np.ones(num_devices)
    if device_capacity is not None:
        capacity_D = np.asarray(device_capacity, np.float64)
    share_D = capacity_D / capacity_D.sum() * max(load_S.sum(), 1e-30)
    safe_D = np.where(share_D > 0, share_D, np.inf)
    used_DI = load_S.reshape(num_devices, -1) / safe_D[:, None]
    return weight_E, expert_S.reshape(num_devices, -1), used_DI


def _counts(expert_DI: np.ndarray, num_experts: int) -> np.ndarray:
    return np.bincount(expert_DI[expert_DI >= 0], minlength=num_experts)


def _colors(expert_DI: np.ndarray, num_experts: int) -> dict[int, str]:
    count_E = _counts(expert_DI, num_experts)
    colors = {-1: style.PAPER} | dict.fromkeys(range(num_experts), style.GRID)
    several = [expert for expert in range(num_experts) if count_E[expert] > 1]
    colors |= {expert: style.distinct(i) for i, expert in enumerate(several)}
    return colors
