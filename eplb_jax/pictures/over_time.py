"""Balancedness over time as pictures: the windows of a replay, the steps of a run.

Pictures need matplotlib (`pip install dualpipe-jax[viz]`), which is imported when one
is drawn.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb_jax import style
from eplb_jax.recordings import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_COLUMNS = 500  # of a heatmap; more could not be told apart


def balancedness_figure(
    balancedness: Any,
    steps: Any = None,
    *,
    unplaced: Any = None,
    placed_at: Sequence[float] = (),
    layers: Sequence[Any] | None = None,
    title: str = "Balancedness",
) -> Figure:
    """Draws balancedness over the steps: mean and worst layer above, all layers below.

    Args:
      balancedness: [steps, layers], mean device load over maximal device load; NaN if
        unknown.
      steps: [steps] ascending numbers for the axis; None: 1, 2, 3, ...
      unplaced: [steps], the mean over layers with experts in order, for comparison.
      placed_at: steps at which experts were rebalanced, marked below the lines.
      layers: a name for each layer; None: from 0.
      title: above the picture.

    Returns:
      A matplotlib `Figure`; save it with `figure.savefig(path)`. With more than 500
      steps, a cell of the lower picture is the mean of several.

    Raises:
      ValueError: if sizes do not agree, or there is no step or no layer.

    Examples:
      >>> figure = balancedness_figure([[0.5, 1.0], [0.75, 1.0]], [10, 20])
      >>> [line.get_ydata().tolist() for line in figure.axes[0].lines]
      [[0.75, 0.875], [0.5, 0.75]]
    """
    value_WL = np.asarray(balancedness, np.float64)
    if value_WL.ndim != 2 or not value_WL.size:
        raise ValueError(
            f"balancedness has shape {value_WL.shape}, but it must be [steps, layers], "
            "with at least one of each."
        )
    num_steps, num_layers = value_WL.shape
    step_W = (
        np.arange(1.0, num_steps + 1) if steps is None else np.asarray(steps, float)
    )
    names = list(range(num_layers)) if layers is None else list(layers)
    for name, shape, wanted in (
        ("steps", step_W.shape, (num_steps,)),
        ("layers", (len(names),), (num_layers,)),
        ("unplaced", (num_steps,) if unplaced is None else np.shape(unplaced),
         (num_steps,)),
    ):  # fmt: skip
        if shape != wanted:
            raise ValueError(
                f"{name} has shape {shape}, but balancedness has {num_steps} steps and "
                f"{num_layers} layers; pass {name} of shape {wanted}."
            )
    if not (np.diff(step_W) > 0).all() or not np.isfinite(step_W).all():
        raise ValueError(
            "steps must be finite and ascending; sort them, and balancedness with them."
        )
    figure = style.figure(8, 3.2 + float(np.clip(0.12 * num_layers, 0.8, 6)))
    top, bottom = style.axes(
        figure, 2, sharex=True, height_ratios=[2.2, np.clip(0.12 * num_layers, 0.8, 6)]
    )
    style.dress(top, "y")
    masked_WL = np.ma.masked_invalid(value_WL)
    mean_W, worst_W = masked_WL.mean(axis=1), masked_WL.min(axis=1)
    dots = {"marker": "o", "markersize": 3} if num_steps < 30 else {}
    top.plot(step_W, mean_W, color=style.BLUE, linewidth=1.6, label="mean", **dots)
    top.plot(
        step_W, worst_W, color=style.VERMILION, linewidth=1, label="worst layer", **dots
    )
    if unplaced is not None:
        label = "mean, experts in order"
        top.plot(
            step_W, np.asarray(unplaced, float), color=style.GREY, linewidth=1,
            label=label, **dots,
        )  # fmt: skip
    top.set_ylim(0, 1.02)
    top.set_ylabel("mean load of a GPU\nover the largest")
    if len(placed_at):
        top.plot(
            placed_at, np.full(len(placed_at), 0.02), "|", color=style.INK,
            markersize=6, label="experts rebalanced",
        )  # fmt: skip
    style.legend(top, above=True, columns=4)
    _draw_layers(figure, bottom, step_W, masked_WL, names)
    style.heading(figure, title)
    return figure


def _draw_layers(
    figure: Any, axes: Any, step_W: np.ndarray, value_WL: Any, names: list[Any]
) -> None:
    stride = -(-len(step_W) // _MAX_COLUMNS)
    firsts = range(0, len(step_W), stride)
    cells = np.ma.stack([value_WL[i : i + stride].mean(axis=0) for i in firsts])
    # A column reaches half way to its neighbours on both sides.
    middles = (step_W[1:] + step_W[:-1]) / 2
    widths = np.diff(step_W)
    first = step_W[0] - (widths[0] / 2 if len(widths) else 0.5)
    last = step_W[-1] + (widths[-1] / 2 if len(widths) else 0.5)
    inner = middles[stride - 1 :: stride][: len(firsts) - 1]
    edges = np.concatenate([[first], inner, [last]])
    lowest = cells.min()
    floor = 0.0 if lowest is np.ma.masked else np.floor(10 * float(lowest)) / 10
    mesh = axes.pcolormesh(
        edges, np.arange(len(names) + 1) - 0.5, cells.T, cmap=style.colormap(),
        vmin=min(floor, 0.9), vmax=1, rasterized=True,
    )  # fmt: skip
    axes.set_facecolor(style.EMPTY)
    axes.set_ylim(len(names) - 0.5, -0.5)
    every = -(-len(names) // 20)
    axes.set_yticks(range(0, len(names), every), [str(n) for n in names[::every]])
    axes.set_ylabel("layer")
    axes.set_xlabel("step")
    axes.set_xlim(edges[0], edges[-1])
    bar = figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=style.SMALL, labelcolor=style.INK)


def replay_figure(names: tuple[str, ...], outcomes: dict[str, Outcome]) -> Figure:
    """Draws a replay over its windows: balancedness above, replicas moved below.

    Args:
      names: names of the windows.
      outcomes: from `replay`.

    Returns:
      A matplotlib `Figure`; save it with `figure.savefig(path)`.

    Raises:
      ValueError: if there is no outcome.

    Examples:
      >>> outcome = Outcome(np.array([0.5]), np.array([0.25]), np.array([0.125]))
      >>> len(replay_figure(("a", "b"), {"once": outcome}).axes)
      2
    """
    if not outcomes:
        raise ValueError("outcomes is empty; pass those of replay.")
    steps = np.arange(len(names) - 1)
    width = float(np.clip(1.1 * len(names) + 2, 6.5, 20))
    figure = style.figure(width, 6)
    top, bottom = style.axes(figure, 2, grid="y", sharex=True, height_ratios=[2, 1])
    bar = 0.8 / len(outcomes)
    for i, (name, outcome) in enumerate(outcomes.items()):
        color = style.POLICIES.get(name, style.INK)
        label = f"{name}: mean {outcome.balancedness.mean():.3f}"
        top.plot(steps, outcome.balancedness, "o-", color=color, label=label)
        top.fill_between(
            steps, outcome.worst, outcome.balancedness, color=color, alpha=0.10, lw=0
        )
        offset = (i - (len(outcomes) - 1) / 2) * bar
        bottom.bar(steps + offset, 100 * outcome.moved, bar * 0.9, color=color)
    top.set_ylim(0, 1.02)
    style.legend(top, above=True, columns=len(outcomes))
    top.set_ylabel("balancedness on the next window\n(band: down to the worst layer)")
    bottom.set_ylabel("replicas moved (%)")
    labels = [f"{old}\n→ {new}" for old, new in itertools.pairwise(names)]
    bottom.set_xticks(steps, labels)
    if max(len(name) for name in names) > 8:
        for label in bottom.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    return figure
