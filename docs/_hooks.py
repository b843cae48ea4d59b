"""Hooks of the documentation's site (`mkdocs.yml`).

The pages are written for readers of the repository: they link to its files by relative
paths. The site gets a page for every file that is linked to, so the same links work
there without knowing the repository's address. Python blocks with prompts are
highlighted as such, and the search index is also written as a script, which pages
opened as files can load.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = "docs"
# Folder of the pages for the repository's files, below the site's root.
PLACE = "repository"
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(`{3,}).*?^\1$", re.M | re.S)
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", "": "text"}

log = get_plugin_logger("repository")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file of the repository that a page links to."""
    todo = [file.src_uri for file in files.documentation_pages()]
    for src_uri in todo:  # which grows
        text = files.src_uris[src_uri].content_string
        for _, path in links_of(text, repository_path(src_uri)):
            target = source_uri(path)
            if target in files.src_uris or not (ROOT / path).exists():
                continue
            files.append(File.generated(config, target, content=page_of(path)))
            todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_) -> str:
    """Points links to the site's pages, and names the language of doctests."""
    here = page.file.src_uri

    def lead(match: re.Match[str]) -> str:
        path = resolve(match[2], repository_path(here))
        if path is None:
            return match[0]
        target = source_uri(path)
        if target not in files.src_uris:
            log.warning(f"{here} links to {match[2]}, which does not exist.")
            return match[0]
        link = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"{match[1]}{link}{match[3]}"

    def of_prose(text: str) -> str:
        return LINK.sub(lead, text)

    def of_code(text: str) -> str:
        return re.sub(r"^```python\n(?=>>> )", "```pycon\n", text)

    return "".join(parts(markdown, of_prose, of_code))


def on_post_build(config: MkDocsConfig, **_) -> None:
    """Writes the search index as a script, too, which a page opened as a file loads."""
    index = Path(config.site_dir, "search", "search_index.json")
    text = f"var __index = {index.read_text(encoding='utf-8')}"
    index.with_suffix(".js").write_text(text, encoding="utf-8")


def parts(
    markdown: str, of_prose: Callable[[str], str], of_code: Callable[[str], str]
) -> Iterator[str]:
    """Yields the text, changed by one function outside of fences and by one inside."""
    end = 0
    for fence in FENCE.finditer(markdown):
        yield of_prose(markdown[end : fence.start()])
        yield of_code(fence[0])
        end = fence.end()
    yield of_prose(markdown[end:])


def links_of(markdown: str, path: str) -> Iterator[tuple[str, str]]:
    """Yields (link, path in the repository) of a page's links to the repository."""
    for prose in parts(markdown, lambda text: text, lambda _: ""):
        for match in LINK.finditer(prose):
            target = resolve(match[2], path)
            if target is not None:
                yield match[2], target


def resolve(link: str, path: str) -> str | None:
    """Returns the path in the repository of a link on `path`; None: it is external."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def repository_path(src_uri: str) -> str:
    """Returns the path in the repository of a page: the inverse of `source_uri`."""
    if not src_uri.startswith(f"{PLACE}/"):
        return f"{DOCS}/{src_uri}"
    path = src_uri.removeprefix(f"{PLACE}/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def source_uri(path: str) -> str:
    """Returns the page of a file of the repository."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"{PLACE}/{path}" + ("" if path.endswith(".md") else ".md")


def page_of(path: str) -> str:
    """Returns the page of a file: its text or code, or a folder's contents."""
    file = ROOT / path
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n"
    if file.is_dir():
        return head + f"# {path}\n\n" + "\n".join(contents_of(file, path)) + "\n"
    if file.suffix == ".md":
        return head + file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return head + "\n\n".join(cells_of(json.loads(file.read_text("utf-8")))) + "\n"
    text = file.read_text(encoding="utf-8")
    language = LANGUAGES.get(file.suffix, "text")
    # Four, since docstrings may have fences of three.
    return f"{head}# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def cells_of(notebook: dict[str, Any]) -> Iterator[str]:
    """Yields the cells of a notebook: prose, code, and printed output."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
        elif cell["cell_type"] == "code":
            yield f"````python\n{source}\n````"
            for output in cell["outputs"]:
                text = output.get("text") or output.get("data", {}).get("text/plain")
                if text:
                    yield f"````text\n{''.join(text)}\n````"


def contents_of(folder: Path, path: str) -> Iterator[str]:
    """Yields a line for each file: its name, and the start of its docstring."""
    for file in sorted(folder.iterdir()):
        if file.name.startswith(("_", ".")):
            continue
        entry = f"`{file.name}`"
        if file.suffix in {".py", ".md"}:
            entry = f"[{entry}]({posixpath.basename(path)}/{file.name})"
        if file.suffix == ".py":
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            entry += f": {doc.partition(chr(10))[0]}"
        yield f"- {entry}"
