"""The style of all pictures of both packages: colours and matplotlib figures.

This module imports nothing from either package, and matplotlib only when a figure is
made. It changes no global state, neither matplotlib's rcParams nor pyplot's figures,
so the caller's own settings and figures stay as they are.
"""

from __future__ import annotations

import colorsys
import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Text, its background, and lines and areas for comparison only.
INK, FAINT, PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"
GRID, EMPTY = "#e2e2e2", "#f0f0f0"
# The same for dark mode, in pages that follow the reader's preference.
DARK = {INK: "#ececec", FAINT: "#a3a3a3", PAPER: "#161616", GRID: "#383838"}

# Okabe and Ito's colours, which colour-blind readers can tell apart.
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE, GREY = "#0072b2", "#d55e00", "#cc79a7", "#999999"
# In this order, for lines that have no colour by name.
LINES = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY)

# For each op, directions 0 and 1; INK is readable on all of them.
OPS = {
    "F": ("#ffdb94", ORANGE),
    "B": ("#94d9c4", GREEN),
    "I": ("#c4e4f7", SKY),
    "W": ("#eecbdd", PURPLE),
}
# For lines: schedules, and policies of expert load balancing.
SCHEDULES = {
    "dualpipe": BLUE,
    "dualpipev": SKY,
    "zb1p": GREEN,
    "one_f_one_b": ORANGE,
    "gpipe": GREY,
    "zbv": YELLOW,
    "v_half": "#8c510a",
    "v_min": "#bf9b6a",
    "interleaved_1f1b": VERMILION,
    "interleaved_zero_bubble": PURPLE,
    "looped_bfs": INK,
}
POLICIES = {"never": GREY, "once": SKY, "upstream": ORANGE, "refine": GREEN}
# Communication: hidden under compute, and exposed.
HIDDEN, EXPOSED = "#b8cfe0", VERMILION
OTHER = "#d0d0d0"  # compute that belongs to no phase
# From bad to good, ever lighter: dark cells are the ones to look at.
SCALE = ("#67000d", "#b23a0e", VERMILION, "#f0a868", "#fbe3c8", "#fffaf2")

TEXT, SMALL, TITLE = 9.0, 8.0, 11.0
_GOLDEN = 0.61803398875  # makes the hues of neighbours differ most

Grid = Literal["", "x", "y", "both"]


def figure(
    width: float, height: float, *, dpi: float = 100, layout: Any = "constrained"
) -> Figure:
    """Makes an empty figure, independent of pyplot, that displays in a notebook.

    Args:
      width: in inches.
      height: in inches.
      dpi: pixels per inch.
      layout: see matplotlib's `Figure`.

    Returns:
      A matplotlib `Figure`; save it with `figure.savefig(path)`.

    Raises:
      ImportError: matplotlib is not installed.

    Examples:
      >>> drawn = figure(6, 3)
      >>> top, bottom = axes(drawn, 2, grid="y", height_ratios=[2, 1])
      >>> png(drawn)[1:4]
      b'PNG'
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib; pip install 'dualpipe-jax[viz]'."
        ) from error
    made = Figure(figsize=(width, height), dpi=dpi, layout=layout, facecolor=PAPER)
    FigureCanvasAgg(made)
    # For notebooks in which IPython has no display hook for matplotlib.
    made.__dict__["_repr_png_"] = functools.partial(png, made)
    return made


def png(drawn: Figure, dpi: float = 150) -> bytes:
    """Renders a figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=dpi, facecolor=PAPER)
    return stream.getvalue()


def axes(
    drawn: Figure,
    rows: int = 1,
    columns: int = 1,
    *,
    grid: Grid = "",
    sharex: bool = False,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Axes, ...]:
    """Adds axes in this style to a figure, row by row.

    Args:
      drawn: the figure.
      rows: number of rows.
      columns: number of columns.
      grid: the axes whose ticks have grid lines.
      sharex: whether all rows share their x axis.
      height_ratios: relative heights of the rows.
    """
    made = drawn.subplots(
        rows, columns, sharex=sharex, squeeze=False, height_ratios=height_ratios
    )
    for each in made.flat:
        dress(each, grid)
    return tuple(made.flat)


def dress(plain: Axes, grid: Grid = "") -> None:
    """Applies this style to existing axes."""
    plain.set_facecolor(PAPER)
    plain.spines[["top", "right"]].set_visible(False)
    plain.spines[:].set(color=FAINT, linewidth=0.8)
    plain.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    for axis in (plain.xaxis, plain.yaxis):
        axis.label.set(fontsize=TEXT, color=INK)
    if grid:
        plain.grid(True, axis=grid, color=GRID, linewidth=0.8)
        plain.set_axisbelow(True)


def heading(drawn: Figure, text: str, below: str = "") -> None:
    """Adds a left-aligned title to a figure, and a fainter line below it."""
    drawn.suptitle(text, x=0.01, ha="left", fontsize=TITLE, color=INK, parse_math=False)
    if below:
        # As the title of the topmost axes, for which the layout leaves room.
        drawn.axes[0].set_title(
            below, loc="left", fontsize=TEXT, color=FAINT, parse_math=False
        )


def legend(owner: Axes, *, above: bool = False, columns: int = 1, **options) -> None:
    """Adds a legend without a frame: inside the axes, or in rows above them."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)} if above else {}
    owner.legend(
        **{
            "frameon": False,
            "fontsize": SMALL,
            "labelcolor": INK,
            "ncols": columns,
            **place,
            **options,
        }
    )


def rgb(colour: str) -> tuple[float, float, float]:
    """Returns red, green and blue of `#rrggbb`, from 0 to 1.

    Examples:
      >>> rgb("#ff8000")[:2]
      (1.0, 0.5019607843137255)
    """
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _hex(parts: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def distinct(index: int) -> str:
    """Returns a colour for item `index` of many, unlike those of its neighbours."""
    light = 0.62 - 0.16 * (index % 3) / 2
    return _hex(colorsys.hls_to_rgb(index * _GOLDEN % 1, light, 0.62))


def scale(part: float) -> str:
    """Returns the colour of `SCALE` for a value from 0 (bad) to 1 (good).

    Examples:
      >>> scale(0.0) == SCALE[0], scale(1.0) == SCALE[-1]
      (True, True)
    """
    place = min(max(part, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    pairs = zip(rgb(SCALE[low]), rgb(SCALE[low + 1]), strict=True)
    return _hex([a + (b - a) * (place - low) for a, b in pairs])


def colormap() -> Any:
    """Returns `SCALE` as a matplotlib colormap; NaN is `EMPTY`."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("balance", SCALE).with_extremes(bad=EMPTY)


def luminance(colour: str) -> float:
    """Returns the relative luminance as WCAG 2.2 defines it, from 0 to 1."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in rgb(colour)
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def ink_on(colour: str) -> str:
    """Returns INK or PAPER, whichever is easier to read on a colour.

    Examples:
      >>> ink_on(YELLOW) == INK, ink_on(BLUE) == PAPER
      (True, True)
    """
    back = luminance(colour) + 0.05
    dark, light = luminance(INK) + 0.05, luminance(PAPER) + 0.05
    return INK if back / dark >= light / back else PAPER
