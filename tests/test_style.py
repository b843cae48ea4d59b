"""One style for all pictures: checks its colours, and that no other module has any."""

import ast
import io
import itertools
import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.colors import to_hex

from eplb_jax import style

ROOT = Path(__file__).parent.parent
PACKAGES = ("dualpipe_jax", "eplb_jax")
# Keywords that take a colour: color=, facecolor=, fill= and the like.
TAKES_COLOUR = re.compile(r"colou?rs?$|^(c|fc|ec|fill|edge)$")
NO_COLOUR = {"none", "auto", "inherit"}


def colours_in(source: str) -> list[str]:
    """Returns the colours in a module, written as #rrggbb or as a keyword's value."""
    tree = ast.parse(source)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documents:
                found += re.findall(
                    r"(?<![\w&])#(?:[\da-fA-F]{3,4}){1,2}\b", node.value
                )
        elif isinstance(node, ast.keyword) and TAKES_COLOUR.search(node.arg or ""):
            value = getattr(node.value, "value", None)
            if isinstance(value, str) and value not in NO_COLOUR:
                found.append(value)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('INK = "#1a1a1a"', ["#1a1a1a"]),
        ("page = f\"<td style='color:#fff'>{x}\"", ["#fff"]),
        ('axes.plot(x, color="white")', ["white"]),
        ('Rectangle(x, facecolor="C0", edgecolor="none")', ["C0"]),
        ('"""As torchtitan#774, and #774."""\nx = "torchtitan#774 &#123;"', []),
        ("axes.plot(x, color=style.INK, fill=True)", []),
    ],
)
def test_the_search_for_colours_finds_them(source, found):
    assert colours_in(source) == found


def test_only_the_style_names_colours():
    modules = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    assert len(modules) > 100
    found = {
        str(path.relative_to(ROOT)): colours
        for path in modules
        if (colours := colours_in(path.read_text()))
    }
    assert set(found) == {"eplb_jax/style.py"}, found


def test_a_figure_changes_nothing_global():
    # As in a user's dark theme.
    with matplotlib.rc_context({"axes.facecolor": "#000000", "text.color": "#00ff00"}):
        before = dict(matplotlib.rcParams)
        figure = style.figure(2, 1)
        (axes,) = style.axes(figure, grid="both")
        axes.plot([0, 1], [0, 1], color=style.BLUE, label="a")
        axes.set_xlabel("x")
        style.legend(axes)
        style.heading(figure, "$a", "b_")
        pixels = matplotlib.image.imread(io.BytesIO(figure._repr_png_()))
        assert dict(matplotlib.rcParams) == before
        assert not Gcf.get_all_fig_managers()
        texts = [axes.xaxis.label, figure._suptitle, axes.get_legend().get_texts()[0]]
        assert {to_hex(text.get_color()) for text in texts} == {style.INK}
    assert pixels.shape[:2] == (150, 300)
    black = (pixels[..., :3] == 0).all(axis=-1)
    assert tuple(pixels[0, 0, :3]) == style.rgb(style.PAPER) and not black.any()


def test_figures_without_matplotlib_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dualpipe-jax\[viz\]'"):
        style.figure(2, 1)


def test_luminance_is_that_of_the_guidelines():
    assert style.luminance("#000000") == 0 and style.luminance("#ffffff") == 1
    # https://www.w3.org/TR/WCAG22: contrast of #767676 on white is 4.54.
    assert 1.05 / (style.luminance("#767676") + 0.05) == pytest.approx(4.54, abs=0.005)


def test_the_scale_gets_lighter_and_faint_text_is_readable():
    steps = [style.luminance(style.scale(i / 50)) for i in range(51)]
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert style.scale(-1) == style.SCALE[0] and style.scale(2) == style.SCALE[-1]
    for dark in (False, True):  # WCAG 2.2, success criterion 1.4.3
        ink, faint, paper = (
            style.luminance(style.DARK[c] if dark else c) + 0.05
            for c in (style.INK, style.FAINT, style.PAPER)
        )
        for text in (ink, faint):
            assert max(text / paper, paper / text) >= 4.5


@pytest.mark.parametrize("index", range(40))
def test_many_colours_differ_and_numbers_on_them_are_readable(index):
    face = style.distinct(index)
    assert face not in {style.distinct(i) for i in range(index)}
    back, text = (style.luminance(c) + 0.05 for c in (face, style.ink_on(face)))
    assert max(back / text, text / back) >= 3  # large or bold text; names are beside it
