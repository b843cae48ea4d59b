"""docs/eplb.md: its snippet runs, its links lead somewhere."""

import doctest
import re
from pathlib import Path

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
