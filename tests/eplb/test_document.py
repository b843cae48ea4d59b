"""docs/eplb.md: its snippet runs, its links lead somewhere, its output is real."""

import doctest
import re
from pathlib import Path

import pytest

from eplb_jax.cli import main

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "eplb.md"
TEXT = DOCUMENT.read_text()


def test_the_snippet_runs():
    results = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [link for link in links if "://" not in link]
    assert local
    assert not [link for link in local if not (DOCUMENT.parent / link).exists()]


@pytest.mark.slow
def test_commands_print_what_the_document_says(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```", TEXT, re.M | re.S)
    assert len(blocks) == 2
    for command, output in blocks:
        words = command.split()
        assert words[:3] == ["python", "-m", "eplb_jax"]
        assert main(words[3:]) == 0
        printed = capsys.readouterr().out
        shown, is_cut, _ = output.partition("...\n")
        assert printed.startswith(shown)
        assert is_cut or printed == shown
