"""The page at `/`: what /metrics says, live, in one file that needs nothing else."""

from __future__ import annotations

import html
import json
from pathlib import Path

from eplb_jax import style

_TEMPLATE = Path(__file__).with_name("page.html")
# The page loads nothing and sends nothing, but to this server.
SECURITY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def _variables(*, is_dark: bool) -> str:
    shades = {
        "ink": style.INK,
        "faint": style.FAINT,
        "paper": style.PAPER,
        "grid": style.GRID,
    }
    values = {n: style.DARK[each] if is_dark else each for n, each in shades.items()}
    values["line"] = style.SKY if is_dark else style.BLUE
    values["hot"] = style.VERMILION
    return "; ".join(f"--{name}: {value}" for name, value in values.items())


def page(model: str) -> str:
    """Returns the page's HTML.

    Args:
      model: its name.

    Examples:
      >>> "<title>a &lt;b&gt;</title>" in page("a <b>")
      True
    """
    dark = f":root {{ {_variables(is_dark=True)} }}"
    variables = (
        f":root {{ color-scheme: light dark; {_variables(is_dark=False)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ {dark} }}"
    )
    text = _TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("VARIABLES", variables).replace(
        "SCALE", json.dumps(list(style.SCALE))
    )
    return text.replace("MODEL", html.escape(model))
