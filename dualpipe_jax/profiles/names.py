"""The names that XLA's profile leaves out: from an operation to its `op_name`.

jax.profiler's events carry `hlo_module` and `hlo_op`. The path of named scopes, which
says what phase an operation belongs to, stands in the compiled module. A run that
profiles itself writes it down beside the profile.
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
    """The operations of the modules in a profile; none if nobody wrote them down.

    Args:
      path: the trace. Its folder is looked at, and, if jax.profiler made that, the one
        that it was told to write to.

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
                    f"{file} is damaged ({error}); remove it, and phases are told by "
                    "what the profile itself says, or record it anew."
                ) from None
    return {}
