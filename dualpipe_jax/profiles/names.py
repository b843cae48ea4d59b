"""Reads and writes the names that XLA's profile leaves out: each operation's `op_name`.

jax.profiler's events carry `hlo_module` and `hlo_op`. Only the compiled module has the
path of named scopes, which says what phase an operation belongs to, so `profile` writes
these paths to a file beside the profile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FILE = "op_names.json"


class Op(NamedTuple):
    """An operation of a compiled module.

    Attributes:
      opcode: XLA's, such as `"fusion"` or `"all-to-all"`.
      op_name: the path of named scopes and transformations; "" if XLA dropped it.
    """

    opcode: str
    op_name: str


Names = Mapping[str, Mapping[str, Op]]


def write_names(folder: Path, names: Names) -> None:
    """Writes modules' operations where `read_names` finds them."""
    aside = folder / f"{FILE}.new"
    aside.write_text(json.dumps(names))
    aside.replace(folder / FILE)


def read_names(path: Path) -> dict[str, dict[str, Op]]:
    """Reads the operations of a profile's modules; empty if there is no such file.

    Args:
      path: the trace. The file is looked for in its folder and, if jax.profiler made
        that, in the folder that jax.profiler was given.

    Raises:
      ValueError: the file is damaged.
    """
    folders = path.resolve().parents
    candidates = [folders[0]]
    if [folder.name for folder in folders[1:3]] == ["profile", "plugins"]:
        candidates.append(folders[3])
    for file in (folder / FILE for folder in candidates):
        if file.is_file():
            try:
                raw = json.loads(file.read_text())
                return {
                    module: {name: Op(*op) for name, op in ops.items()}
                    for module, ops in raw.items()
                }
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file} is damaged ({error}); remove it to read phases from the "
                    "profile alone, or record the profile again."
                ) from None
    return {}
