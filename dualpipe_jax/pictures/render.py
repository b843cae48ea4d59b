"""Renders a laid-out picture: SVG as text, PNG with matplotlib."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape, quoteattr

from dualpipe_jax.pictures.picture import Picture
from eplb_jax import style


def to_svg(picture: Picture) -> str:
    """Renders the picture as a self-contained SVG element."""
    width, height = math.ceil(picture.width), math.ceil(picture.height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" '
        f"aria-label={quoteattr(picture.title)} "
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
        f"<title>{escape(picture.title)}</title>",
        f'<rect width="{width}" height="{height}" fill="{style.PAPER}"/>',
    ]
    for box in picture.boxes:
        edge = (
            f' stroke="{box.edge}" stroke-width="{box.edge_width:g}"'
            if box.edge_width
            else ""
        )
        shape = (
            f'<rect x="{box.x:.2f}" y="{box.y:.2f}" width="{box.width:.2f}" '
            f'height="{box.height:.2f}" fill="{box.fill}"{edge}'
        )
        # An empty box is a border: the pointer should reach the box under it.
        shape += ' pointer-events="none"' if box.fill == "none" else ""
        tip = f"><title>{escape(box.tip)}</title></rect>" if box.tip else "/>"
        parts.append(shape + tip)
    for text in picture.texts:
        bold = ' font-weight="bold"' if text.bold else ""
        parts.append(
            f'<text x="{text.x:.2f}" y="{text.y:.2f}" font-size="{text.size:g}" '
            f'text-anchor="{text.anchor}" fill="{text.colour}"{bold} '
            f'pointer-events="none">{escape(text.text)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def to_png(picture: Picture, dpi: int = 200) -> bytes:
    """Renders the picture as PNG, with matplotlib.

    Raises:
      ImportError: matplotlib is not installed.
    """
    # At 100 pixels per inch, a pixel is 0.72 points.
    figure = style.figure(picture.width / 100, picture.height / 100, layout="none")
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, picture.width))
    axes.set_ylim(picture.height, 0)
    axes.set_axis_off()
    patches = [
        Rectangle(
            (box.x, box.y),
            box.width,
            box.height,
            facecolor=box.fill,
            edgecolor=box.edge,
            linewidth=0.72 * box.edge_width,
        )
        for box in picture.boxes
    ]
    axes.add_collection(PatchCollection(patches, match_original=True))
    align = {"start": "left", "middle": "center", "end": "right"}
    for text in picture.texts:
        axes.text(
            text.x,
            text.y,
            text.text,
            fontsize=0.72 * text.size,
            fontweight="bold" if text.bold else "normal",
            color=text.colour,
            horizontalalignment=align[text.anchor],
            verticalalignment="baseline",
            parse_math=False,
        )
    return style.png(figure, dpi)
