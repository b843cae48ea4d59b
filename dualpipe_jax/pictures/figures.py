"""Figures that compare schedules: bubbles over the number of microbatches.

A figure is a matplotlib `Figure` (`pip install dualpipe-jax[viz]`), which a notebook
displays and `figure.savefig(path)` writes as PNG, SVG or PDF. Pictures of one schedule
are in `show`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dualpipe_jax.lowering import lower
from dualpipe_jax.pictures.picture import KINDS
from dualpipe_jax.schedules import Costs, simulate
from dualpipe_jax.schedules.generators import SCHEDULES
from eplb_jax import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By the generators' names, so that 1F1B appears once.
ALL_KINDS = tuple({make.__name__: None for make in SCHEDULES.values()})


def bubble_ratios(
    num_ranks: int,
    microbatches: Iterable[int] | None = None,
    costs: Costs = Costs(),  # noqa: B008
    kinds: Iterable[str] | None = None,
    *,
    lowered: bool = False,
) -> dict[str, dict[int, float]]:
    """Returns the bubble ratio of each schedule at each number of microbatches.

    Args:
      num_ranks: size of the pipeline.
      microbatches: per training step; by default from P to 8P, in steps of P/2.
      costs: of one of P stages on one microbatch. A schedule with several stages a
        rank is charged as many parts of each, except `p2p`.
      kinds: names of schedules; all by default.
      lowered: simulate the lowered programs, including the waits that their permutes
        cause.

    Returns:
      For each schedule {M: mean bubble of a rank over the makespan}, without those M
      for which the schedule does not exist. DualPipe has none if P is odd.

    Raises:
      ValueError: a name is unknown, or no schedule exists for any of these sizes.

    Examples:
      >>> bubble_ratios(4, [4, 8, 9], kinds=["dualpipe", "1f1b"])
      {'dualpipe': {8: 0.0769...}, 'one_f_one_b': {4: 0.4285..., 8: 0.27..., 9: 0.25}}
    """
    if num_ranks < 1:
        raise ValueError(f"{num_ranks=} must be at least 1.")
    if microbatches is None:
        microbatches = range(num_ranks, 8 * num_ranks + 1, max(1, num_ranks // 2))
    names = ALL_KINDS if kinds is None else tuple(kinds)
    if unknown := [name for name in names if name not in SCHEDULES]:
        raise ValueError(
            f"kinds: {unknown[0]!r} is unknown; use some of {', '.join(SCHEDULES)}."
        )
    sizes = sorted(set(microbatches))
    ratios: dict[str, dict[int, float]] = {}
    refused = None
    for name in names:
        make = SCHEDULES[name]
        found = ratios.setdefault(make.__name__, {})
        for num_microbatches in sizes:
            try:
                schedule = make(num_ranks, num_microbatches)
            except ValueError as error:
                refused = error
                continue
            part = _part(costs, schedule.num_stages // num_ranks)
            timed = lower(schedule) if lowered else schedule
            found[num_microbatches] = simulate(timed, part).bubble_ratio
    if not any(ratios.values()):
        raise ValueError(
            f"no schedule of {', '.join(ratios)} exists for {num_ranks=} and "
            f"microbatches={sizes}; the last error was: {refused}"
        )
    return ratios


def _part(costs: Costs, parts: int) -> Costs:
    """Returns the costs of one of several equal parts of a stage."""
    names = ("F", "I", "W", "B", "FB")
    return Costs(**{n: getattr(costs, n) / parts for n in names}, p2p=costs.p2p)


def bubble_table(ratios: dict[str, dict[int, float]]) -> str:
    """Formats `bubble_ratios` as text, in percent; `-` if a schedule does not exist.

    Examples:
      >>> print(bubble_table(bubble_ratios(4, [7, 8], kinds=["dualpipe", "zb1p"])))
         M  DualPipe    ZB1P
         7         -  12.5 %
         8     7.7 %  11.1 %
    """
    names = {kind: KINDS.get(kind, kind) for kind in ratios}
    widths = [2 + max(7, len(name)) for name in names.values()]
    header = zip(names.values(), widths, strict=True)
    lines = [f"{'M':>4}" + "".join(f"{name:>{width}}" for name, width in header)]
    for size in sorted({size for found in ratios.values() for size in found}):
        cells = [
            f"{100 * found[size]:.1f} %" if size in found else "-"
            for found in ratios.values()
        ]
        row = zip(cells, widths, strict=True)
        lines.append(f"{size:>4}" + "".join(f"{cell:>{width}}" for cell, width in row))
    return "\n".join(lines)


def bubble_ratio(
    num_ranks: int,
    microbatches: Iterable[int] | None = None,
    costs: Costs = Costs(),  # noqa: B008
    kinds: Iterable[str] | None = None,
    *,
    lowered: bool = False,
) -> Figure:
    """Draws the bubble ratio of the schedules over the number of microbatches.

    Args:
      num_ranks: size of the pipeline.
      microbatches: as in `bubble_ratios`, like the other arguments.
      costs: of one stage on one microbatch.
      kinds: names of schedules; all by default.
      lowered: simulate the lowered programs.

    Returns:
      A matplotlib `Figure` with one line per schedule, where it exists.

    Raises:
      ValueError: see `bubble_ratios`.
      ImportError: matplotlib is not installed.

    Examples:
      >>> figure = bubble_ratio(4, [8, 16], kinds=["dualpipe", "gpipe"])
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['DualPipe', 'GPipe']
    """
    ratios = bubble_ratios(num_ranks, microbatches, costs, kinds, lowered=lowered)
    figure = style.figure(7, 4.2)
    (axes,) = style.axes(figure, grid="y")
    for kind, found in ratios.items():
        if not found:
            continue
        axes.plot(
            list(found),
            [100 * ratio for ratio in found.values()],
            label=KINDS.get(kind, kind),
            color=style.SCHEDULES.get(kind, style.INK),
            linewidth=1.6,
            marker="o",
            markersize=4,
            # The same bubbles as 1F1B's, or interleaved 1F1B's; dashes let both show.
            linestyle=(0, (4, 2)) if kind in ("gpipe", "looped_bfs") else "-",
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("microbatches of a step")
    axes.set_ylabel("bubbles, % of a rank's time")
    style.legend(axes, above=True, columns=min(5, len(ratios)))
    given = ", ".join(f"{name}={value:g}" for name, value in vars(costs).items())
    ranks = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
    program = ", lowered" if lowered else ""
    style.heading(figure, f"Bubbles of {ranks}{program} ({given})")
    return figure
