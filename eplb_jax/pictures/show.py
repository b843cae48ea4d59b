"""Placements and replays as text and as pictures.

Pictures need matplotlib (`pip install dualpipe-jax[viz]`), which is imported when one
is drawn.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from eplb_jax import style
from eplb_jax.pictures.over_time import balancedness_figure, replay_figure
from eplb_jax.placement import balancedness, physical_expert_loads
from eplb_jax.recordings import Outcome, in_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "balancedness_figure",
    "placement_figure",
    "placement_text",
    "replay_figure",
    "replay_text",
]

_GPUS_A_ROW = 40
_GAP = 0.6


def placement_text(
    weight: Any,
    physical_to_logical_map: Any,
    num_nodes: int,
    num_gpus: int,
    device_capacity: Any = None,
) -> str:
    """One layer's placement: a line for each GPU, its load in percent of its share.

    Args:
      weight: [experts] loads.
      physical_to_logical_map: [slots] int32, -1 for an empty slot.
      num_nodes: nodes.
      num_gpus: GPUs.
      device_capacity: [num_gpus] relative speeds, 0 for a dead GPU.

    Returns:
      Lines of text. A `*` marks experts with more than one replica.

    Examples:
      >>> print(placement_text([6, 2, 1, 3], [0, 1, 2, 0, 3, -1], 1, 2))
      node  gpu    load  experts
         0    0   100 %  0*   1   2
         0    1   100 %  0*   3   -
    """
    weight_E, expert_GK, used_GK = _layer(
        weight, physical_to_logical_map, num_gpus, device_capacity
    )
    count_E = _counts(expert_GK, len(weight_E))
    digits = len(str(len(weight_E) - 1))
    lines = ["node  gpu    load  experts"]
    for gpu, expert_K in enumerate(expert_GK):
        cells = []
        for expert in expert_K:
            name = "-" if expert < 0 else str(expert)
            star = "*" if expert >= 0 and count_E[expert] > 1 else " "
            cells.append(f"{name:>{digits}}{star}")
        node = gpu // (num_gpus // num_nodes)
        percent = f"{100 * used_GK[gpu].sum():.0f} %"
        lines.append(f"{node:4} {gpu:4} {percent:>7}  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def placement_figure(
    weight: Any,
    physical_to_logical_map: Any,
    num_nodes: int,
    num_gpus: int,
    title: str = "",
    device_capacity: Any = None,
) -> Figure:
    """One layer's placement as in upstream's README: nodes, GPUs, slots, and loads.

    Above, what each GPU has to do, slot upon slot, beside what it would have to do
    with experts in order; below, the expert in each slot. Experts with more than one
    replica have a colour of their own.

    Args:
      weight: [experts] loads.
      physical_to_logical_map: [slots] int32, -1 for an empty slot.
      num_nodes: nodes.
      num_gpus: GPUs.
      title: above the picture.
      device_capacity: [num_gpus] relative speeds, 0 for a dead GPU.

    Returns:
      A matplotlib `Figure`; save it with `figure.savefig(path)`.

    Examples:
      >>> figure = placement_figure([6, 2, 1, 3], [0, 1, 2, 0, 3, 1], 1, 2)
      >>> len(figure.axes)
      2
    """
    weight_E, expert_GK, used_GK = _layer(
        weight, physical_to_logical_map, num_gpus, device_capacity
    )
    before_S = in_order(1, len(weight_E), expert_GK.size)[0]
    before_G = _layer(weight_E, before_S, num_gpus)[2].sum(axis=1)
    colors = _colors(expert_GK, len(weight_E))
    per_gpu, per_node = expert_GK.shape[1], num_gpus // num_nodes
    per_row = min(num_gpus, per_node * max(1, _GPUS_A_ROW // per_node))
    if per_node > _GPUS_A_ROW:
        per_row = _GPUS_A_ROW
    num_rows = -(-num_gpus // per_row)
    length = per_row + _GAP * (-(-per_row // per_node) - 1) + 0.6
    width = float(np.clip(0.42 * length, 6.5, 22))
    cell = width / length
    slots_height = float(np.clip(per_gpu * cell * 0.75, 0.6, 8)) + 0.5
    figure = style.figure(width, num_rows * (slots_height + 2.4) + 0.8)
    every_axes = style.axes(
        figure, 2 * num_rows, height_ratios=[2.4, slots_height] * num_rows
    )
    top_of_loads = 1.08 * max(used_GK.sum(axis=1).max(), before_G.max(), 1)
    for row in range(num_rows):
        gpu_G = np.arange(row * per_row, min((row + 1) * per_row, num_gpus))
        # A gap between nodes, so that they are seen before anything is read.
        x_G = gpu_G - gpu_G[0] + _GAP * (gpu_G // per_node - gpu_G[0] // per_node)
        top, bottom = every_axes[2 * row : 2 * row + 2]
        _draw_loads(top, x_G, before_G[gpu_G], used_GK[gpu_G], expert_GK[gpu_G], colors)
        _draw_slots(bottom, x_G, gpu_G, per_node, expert_GK[gpu_G], colors, cell)
        top.set_ylim(0, top_of_loads)
        for axes in (top, bottom):
            axes.set_xlim(-0.8, length - 0.8)
    style.legend(every_axes[0], loc="upper right")
    every_axes[-1].set_xlabel(
        "GPU   (a colour: an expert with several replicas; grey: with one)"
    )
    placement = expert_GK.reshape(1, -1)
    now = balancedness(weight_E[None], placement, num_gpus, device_capacity)
    was = balancedness(weight_E[None], before_S[None], num_gpus)
    style.heading(
        figure,
        f"{title}{': ' if title else ''}balancedness {float(now[0]):.3f}, "
        f"{float(was[0]):.3f} with experts in order",
    )
    return figure


def _draw_loads(
    axes: Any,
    x_G: np.ndarray,
    before_G: np.ndarray,
    used_GK: np.ndarray,
    expert_GK: np.ndarray,
    colors: dict[int, str],
) -> None:
    floor_G = np.zeros(len(x_G))
    for used_G, expert_G in zip(used_GK.T, expert_GK.T, strict=True):
        color = [colors[expert] for expert in expert_G]
        axes.bar(
            x_G,
            used_G,
            0.78,
            floor_G,
            color=color,
            edgecolor=style.PAPER,
            linewidth=0.5,
        )
        floor_G += used_G
    # What the experts in order would come to, over the bars, which often are higher.
    over = np.maximum(before_G, floor_G)
    axes.vlines(x_G, floor_G, over, color=style.FAINT, linewidth=0.8, linestyle=":")
    axes.hlines(
        before_G, x_G - 0.46, x_G + 0.46, color=style.INK, linewidth=1.4,
        label="experts in order",
    )  # fmt: skip
    axes.axhline(1, color=style.FAINT, linewidth=0.8, zorder=0.5)
    axes.set_ylabel("load of the GPU\n(fair share = 1)")
    axes.set_xticks([])


def _draw_slots(
    axes: Any,
    x_G: np.ndarray,
    gpu_G: np.ndarray,
    per_node: int,
    expert_GK: np.ndarray,
    colors: dict[int, str],
    cell: float,
) -> None:
    from matplotlib.patches import Rectangle

    per_gpu = expert_GK.shape[1]
    font = float(np.clip(72 * cell * 0.30, 4, 9))
    for x, expert_K in zip(x_G, expert_GK, strict=True):
        for k, expert in enumerate(expert_K):
            face = colors[expert]
            axes.add_patch(
                Rectangle(
                    (x - 0.46, k - 0.44), 0.92, 0.88, facecolor=face,
                    edgecolor=style.GRID, linewidth=0.4,
                )
            )  # fmt: skip
            if expert >= 0:
                axes.text(
                    x, k, str(expert), ha="center", va="center", fontsize=font,
                    color=style.ink_on(face),
                )  # fmt: skip
    for node in np.unique(gpu_G // per_node):
        x_of_node = x_G[gpu_G // per_node == node]
        axes.text(
            x_of_node.mean(), -0.72, f"node {node}", ha="center", va="bottom",
            fontsize=style.TEXT, color=style.INK,
        )  # fmt: skip
    axes.set_ylim(per_gpu - 0.5, -1.3)
    axes.set_yticks([])
    axes.set_ylabel("slots")
    axes.set_xticks(x_G, [str(gpu) for gpu in gpu_G])
    axes.spines[:].set_visible(False)


def replay_text(names: tuple[str, ...], outcomes: dict[str, Outcome]) -> str:
    """A replay as a table: balancedness, and the part of the slots moved.

    Args:
      names: of the windows.
      outcomes: of `replay`.

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
    num_gpus: int,
    device_capacity: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads, experts [GPUs, slots], and each slot's part of its GPU's fair share."""
    weight_E = np.asarray(weight, np.float32)
    expert_S = np.asarray(physical_to_logical_map, np.int32)
    if weight_E.ndim != 1 or expert_S.ndim != 1 or expert_S.size % num_gpus:
        raise ValueError(
            f"One layer is shown: weight [experts], but it is {weight_E.shape}, and "
            f"physical_to_logical_map [slots], a multiple of {num_gpus=}, but it is "
            f"{expert_S.shape}."
        )
    load_S = np.asarray(
        physical_expert_loads(jnp.asarray(weight_E[None]), jnp.asarray(expert_S[None]))
    )[0]
    capacity_G = np.ones(num_gpus)
    if device_capacity is not None:
        capacity_G = np.asarray(device_capacity, np.float64)
    share_G = capacity_G / capacity_G.sum() * max(load_S.sum(), 1e-30)
    safe_G = np.where(share_G > 0, share_G, np.inf)
    used_GK = load_S.reshape(num_gpus, -1) / safe_G[:, None]
    return weight_E, expert_S.reshape(num_gpus, -1), used_GK


def _counts(expert_GK: np.ndarray, num_experts: int) -> np.ndarray:
    return np.bincount(expert_GK[expert_GK >= 0], minlength=num_experts)


def _colors(expert_GK: np.ndarray, num_experts: int) -> dict[int, str]:
    count_E = _counts(expert_GK, num_experts)
    colors = {-1: style.PAPER} | dict.fromkeys(range(num_experts), style.GRID)
    several = [expert for expert in range(num_experts) if count_E[expert] > 1]
    colors |= {expert: style.distinct(i) for i, expert in enumerate(several)}
    return colors
