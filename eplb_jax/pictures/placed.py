"""One layer's placement as a picture.

It needs matplotlib (`pip install dualpipe-jax[viz]`), which is imported when it is
drawn.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_jax import style
from eplb_jax.pictures.layer import count_by_expert, read_layer
from eplb_jax.placement import balancedness
from eplb_jax.recordings import in_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DEVICES_PER_ROW = 40
_GAP = 0.6


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
    weight_E, expert_DI, used_DI = read_layer(
        weight, physical_to_logical_map, num_devices, device_capacity
    )
    before_S = in_order(1, len(weight_E), expert_DI.size)[0]
    before_D = read_layer(weight_E, before_S, num_devices)[2].sum(axis=1)
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


def _colors(expert_DI: np.ndarray, num_experts: int) -> dict[int, str]:
    count_E = count_by_expert(expert_DI, num_experts)
    colors = {-1: style.PAPER} | dict.fromkeys(range(num_experts), style.GRID)
    several = [expert for expert in range(num_experts) if count_E[expert] > 1]
    colors |= {expert: style.distinct(i) for i, expert in enumerate(several)}
    return colors
