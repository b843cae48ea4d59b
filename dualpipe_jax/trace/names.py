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
_LEVELS = 5  # a profile lies in plugins/profile/DATE below the folder of a run's


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
    (folder / FILE).write_text(json.dumps(names))


def read_names(path: Path) -> dict[str, dict[str, Op]]:
    """The operations of the modules in a profile; none if nobody wrote them down.

    Args:
      path: the trace. Its folder is looked at, and those above it.
    """
    for folder in [*path.resolve().parents][:_LEVELS]:
        if (folder / FILE).is_file():
            raw = json.loads((folder / FILE).read_text())
            return {
                module: {name: Op(*op) for name, op in ops.items()}
                for module, ops in raw.items()
            }
    return {}
