"""Shape suffixes: in `eplb_jax`, a letter never means two things."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "eplb_jax"


def docstring_of(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


LEGEND = dict(
    re.findall(r"^  ([A-Z])  (.+)$", docstring_of(ROOT / "__init__.py"), re.M)
)


def suffixes_in(path):
    """Returns the letters of names such as `loads_LE`, with a name for each."""
    text = path.read_text(encoding="utf-8")
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        match = re.fullmatch(r"[a-z]\w*_([A-Z1]+)", token.string)
        if token.type == tokenize.NAME and match:
            found |= dict.fromkeys(set(match[1]) - {"1"}, token.string)
    return found


def added_by(path):
    """Returns the letters that a file adds: `Shape suffixes: ...; here X items.`"""
    doc = " ".join(docstring_of(path).split())
    match = re.search(
        r"Shape suffixes[^.]*: see `eplb_jax`; here (?:also )?(.*?)\.", doc
    )
    parts = re.split(r", and |, | and ", match[1]) if match else []
    return dict(re.findall(r"^([A-Z]) ([a-z].*)$", "\n".join(parts), re.M))


FILES = {path: suffixes_in(path) for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize(
    "path", [path for path, used in FILES.items() if used], ids=lambda path: path.stem
)
def test_every_letter_is_in_the_legend(path):
    assert re.search(r"Shape suffixes[^.]*: see `eplb_jax`", docstring_of(path))
    known = LEGEND | added_by(path)
    assert not {c: name for c, name in FILES[path].items() if c not in known}


def test_a_letter_means_one_thing():
    assert len(LEGEND) > 10
    meanings = dict(LEGEND)
    for path in FILES:
        for letter, meaning in added_by(path).items():
            assert meanings.setdefault(letter, meaning) == meaning, path
