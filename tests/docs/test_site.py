"""The documentation site builds without warnings, fetches nothing, and has search."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT

# All elements of the theme and of Markdown; other text in <angles> would be lost.
ELEMENTS = {
    *("html", "head", "body", "header", "footer", "main", "nav", "article", "form"),
    *("meta", "title", "link", "script", "style", "svg", "path", "img"),
    *("h1", "h2", "h3", "h4", "p", "div", "span", "a", "b", "em", "strong", "small"),
    *("ul", "ol", "li", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"),
    *("button", "input", "label", "details", "summary"),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # `--strict` turns warnings into errors.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def pages(site):
    """Returns the pages without the contents of code and scripts."""
    code = re.compile(r"<(pre|code|style)\b.*?</\1>|(?<=>)[^<]*(?=</script>)", re.S)
    return {
        path: code.sub("", path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }


def test_pages_fetch_nothing_from_elsewhere(site):
    for path, html in pages(site).items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', html)
        loaded += re.findall(r'<link rel="stylesheet" href="([^"]+)"', html)
        assert not [url for url in loaded if "//" in url], path.name
    for path in site.rglob("*.css"):
        loaded = re.findall(r"url\(([^)]*)\)|@import ([^;]*)", path.read_text())
        urls = [url.strip("'\"") for pair in loaded for url in pair if url]
        urls = [url for url in urls if not url.startswith("data:")]
        assert not [url for url in urls if "//" in url], path.name


def test_every_page_has_a_search_box(site):
    for path, html in pages(site).items():
        assert 'role="search"' in html and 'name="query"' in html, path.name
        text = path.read_text(encoding="utf-8")
        config = re.search(r'<script id="__config"[^>]*>(.*?)</script>', text)
        config = json.loads(config[1])
        if path.name != "404.html":  # its links begin at the site's root
            assert (path.parent / config["search"]).is_file(), path.name
        # For pages opened as files; must precede the script that starts the search.
        assert 0 < text.index("search_in_files.js") < text.index("/bundle.")


def test_the_search_finds_pages_and_names(site):
    text = (site / "search/search_index.json").read_text(encoding="utf-8")
    entries = json.loads(text)["docs"]
    found = {entry["location"] for entry in entries}
    guides = {path.name for path in site.glob("*.html")} - {"404.html"}
    assert guides <= found
    assert "reference/schedules.html#dualpipe_jax.rank_schedules" in found
    assert not [place for place in found if place.startswith("repository/")]
    for place in found:
        page, _, anchor = place.partition("#")
        html = (site / page).read_text(encoding="utf-8")
        assert not anchor or f'id="{anchor}"' in html, place
    # Without a server, the same index is read as a script.
    script = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert script == f"var __index = {text}"


def test_links_between_pages_lead_somewhere(site):
    for path, html in pages(site).items():
        if path.name == "404.html":  # its links begin at the site's root
            continue
        for link in re.findall(r'href="([^"#?]+)[^"]*"', html):
            if "//" not in link and not link.startswith(("mailto:", "data:")):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_nothing_is_left_unrendered(site):
    for path, html in pages(site).items():
        if "repository" in path.relative_to(site).parts:
            continue
        assert set(re.findall(r"<([a-zA-Z][^\s>/]*)", html)) <= ELEMENTS, path.name
        text = re.sub(r"<[^>]+>", "", html)
        left = re.findall(r"```|^:::|^\|.*\|$|^- |&gt;&gt;&gt;|\]\(", text, re.M)
        assert not left, f"{path.name}: {left}"


def test_files_of_the_repository_are_pages(site):
    html = (site / "training.html").read_text(encoding="utf-8")
    assert 'href="repository/configs/tiny.py.html"' in html
    source = (site / "repository/configs/tiny.py.html").read_text(encoding="utf-8")
    assert "DeepSeekConfig" in source
