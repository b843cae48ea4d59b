"""The documentation's site is built without warnings, and fetches nothing."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT

# All that the theme and Markdown make; what is written <so> is lost in a page.
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
    # `--strict` ends with an error where there is a warning.
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
    """The pages without what stands in code and in scripts."""
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
