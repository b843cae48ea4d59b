"""The documents, the fenced blocks in them, and the commands in the blocks."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
# Languages that are run (python, console), checked (bash, json, yaml), and text.
LANGUAGES = {"python", "console", "bash", "json", "yaml", "text"}
_FENCE = re.compile(r"^( *)(`{3,}|~{3,})([^\n]*)\n(.*?)^ *\2 *$", re.M | re.S)


class Block(NamedTuple):
    """One fenced block; `line` is the line of its fence, from 1."""

    document: str
    line: int
    language: str
    text: str

    @property
    def where(self):
        return f"{self.document}:{self.line}"


class Command(NamedTuple):
    """A command after a prompt, and its output according to the document."""

    where: str
    text: str
    comment: str
    output: str


def read(document):
    return (ROOT / document).read_text(encoding="utf-8")


def blocks_of(document):
    text = read(document)
    return [
        Block(document, text[: match.start()].count("\n") + 1, match[3], match[4])
        for match in _FENCE.finditer(text)
    ]


def prose_of(document):
    """Returns the text outside the blocks."""
    return _FENCE.sub("", read(document))


def commands_of(block):
    """Returns a console block's commands; one that ends in & is part of the next."""
    found = []
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        lines = part.splitlines()
        size = 1
        while lines[size - 1].endswith("\\"):
            size += 1
        text, _, comment = "\n".join(lines[:size]).partition(" #")
        text = text.strip()
        if found and found[-1].text.endswith("&"):
            text = f"{found.pop().text}\n{text}\nwait"
        output = "".join(f"{line.rstrip()}\n" for line in lines[size:])
        found.append(Command(block.where, text, comment.strip(), output))
    return found


def all_commands(*documents):
    return [
        command
        for document in documents or DOCUMENTS
        for block in blocks_of(document)
        if block.language == "console"
        for command in commands_of(block)
    ]
