"""The report's page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from xml.etree import ElementTree

from eplb_jax import style

RELOAD_S = 10
# The tags of `show.svg`; a picture with any other is left out of the page.
_TAGS = {"svg", "title", "rect", "text"}
_NAMESPACE = "{http://www.w3.org/2000/svg}"


def _variables(dark: bool) -> str:
    shades = {
        "ink": style.INK,
        "faint": style.FAINT,
        "paper": style.PAPER,
        "grid": style.GRID,
    }
    lines = (style.SKY if dark else style.BLUE, style.VERMILION, style.GREY)
    values = {n: style.DARK[c] if dark else c for n, c in shades.items()}
    values |= {f"line-{i}": colour for i, colour in enumerate(lines, 1)}
    return "; ".join(f"--{name}: {value}" for name, value in values.items())


_CSS = f"""
:root {{ color-scheme: light dark; {_variables(dark=False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(dark=True)} }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif }}
h1 {{ font-size: 1.5rem; margin: 0.3rem 0; overflow-wrap: anywhere }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 0.4rem }}
p {{ margin: 0.4rem 0 }}
.faint, figcaption {{ color: var(--faint) }}
.figures {{ display: grid; gap: 0.8rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)) }}
.figures div {{ border-top: 2px solid var(--grid); padding-top: 0.3rem }}
.figures b {{ display: block; font-size: 1.35rem; font-weight: 600 }}
.wide {{ overflow-x: auto }}
svg.chart {{ display: block; width: 100%; min-width: 32rem; height: auto }}
svg.chart text {{ font-size: 12px; fill: var(--ink) }}
svg.chart text.faint {{ fill: var(--faint) }}
.axis {{ stroke: var(--faint); fill: none }}
.grid {{ stroke: var(--grid); fill: none }}
.line {{ fill: none; stroke-width: 1.6; stroke-linejoin: round }}
.band {{ opacity: 0.18 }}
.cells {{ image-rendering: pixelated }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: 0.15rem 0.8rem 0.15rem 0; text-align: right; white-space: nowrap }}
td:first-child, th:first-child, table.facts td {{ text-align: left }}
table.facts td {{ white-space: normal; vertical-align: top; overflow-wrap: anywhere }}
table.facts td:first-child {{ color: var(--faint); white-space: nowrap }}
th {{ border-bottom: 1px solid var(--faint) }}
pre {{ overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }}
summary {{ cursor: pointer; color: var(--faint) }}
img {{ width: 100%; min-width: 40rem; height: auto }}
"""


def page(title: str, parts: Iterable[str], *, reload: bool) -> str:
    """The whole file; `parts` are HTML already, the title is not."""
    again = f'<meta http-equiv="refresh" content="{RELOAD_S}">\n' if reload else ""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{again}<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def facts(rows: Mapping[str, str]) -> str:
    """A table of names and values."""
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>\n"
        for name, value in rows.items()
    )
    return f'<table class="facts">\n{cells}</table>'


def figures(rows: Mapping[str, str]) -> str:
    """A few numbers, large."""
    cells = "".join(
        f"<div><b>{escape(value)}</b>{escape(name)}</div>"
        for name, value in rows.items()
    )
    return f'<div class="figures">{cells}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text."""
    lines = ["<tr>" + "".join(f"<th>{escape(c)}</th>" for c in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in r) + "</tr>" for r in rows
    ]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def folded(title: str, inside: str) -> str:
    """A part that opens when it is clicked; `inside` is HTML already."""
    return f"<details><summary>{escape(title)}</summary>\n{inside}\n</details>"


def image(png: bytes, title: str) -> str:
    """A picture in the page itself."""
    data = base64.b64encode(png).decode()
    source = f'src="data:image/png;base64,{data}"'
    return f'<div class="wide"><img {source} alt="{escape(title)}"></div>'


def picture(svg: str) -> str | None:
    """A schedule's SVG for the page, or None if it holds what `show.svg` never draws.

    The file is not trusted to be what was written: it could hold a script.
    """
    # No declaration, comment or entity, which HTML parses differently.
    if not svg.startswith("<svg") or "<!" in svg or "<?" in svg:
        return None
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError:
        return None
    for item in root.iter():
        if item.tag.removeprefix(_NAMESPACE) not in _TAGS:
            return None
        for name, value in item.attrib.items():
            if name.startswith(("on", "{")) or name == "style" or "url(" in value:
                return None
    return f'<div class="wide">{svg}</div>'
