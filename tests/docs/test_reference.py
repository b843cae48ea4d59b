"""The reference has every public name, and no name that does not exist."""

import importlib
import pkgutil
import re

import pytest

import dualpipe_jax
import eplb_jax
from tests.docs.blocks import ROOT

# These also list names that neighbouring modules use.
SHARED = {"dualpipe_jax.gpu.memory", "dualpipe_jax.schedules.schedule"}


def public_modules():
    """Returns the modules with `__all__`, except those that begin with _."""
    for package in (dualpipe_jax, eplb_jax):
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not re.search(r"\._", found.name) and found.name not in SHARED:
                module = importlib.import_module(found.name)
                if hasattr(module, "__all__"):
                    yield module


MODULES = list(public_modules())
PAGES = sorted((ROOT / "docs/reference").glob("*.md"))
ENTRIES = [
    entry
    for page in PAGES
    for entry in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)
]


def find(entry):
    """Returns the object of a dotted name, from the longest module in it."""
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    there = [find(entry) for entry in ENTRIES]
    missing = [
        name
        for name in module.__all__
        if not any(getattr(module, name) is each for each in there)
    ]
    page = f"add '::: {module.__name__}.NAME' to a page of docs/reference/"
    assert not missing, f"{missing}: {page}."


def test_nothing_is_there_twice_and_all_of_it_exists():
    found = [id(find(entry)) for entry in ENTRIES]
    assert len(found) == len(set(found))
    assert all((find(entry).__doc__ or "").strip() for entry in ENTRIES)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(path.relative_to(ROOT / "docs")) for path in PAGES}
    pages |= {path.name for path in (ROOT / "docs").glob("*.md")}
    assert all(f": {page}\n" in navigation for page in pages), pages
