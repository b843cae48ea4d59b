"""Reads the groups of devices that a collective runs in."""

from __future__ import annotations

import re

import numpy as np


def replica_groups(text: str, num_devices: int) -> list[np.ndarray]:
    """Reads replica groups in any of the syntaxes that XLA prints.

    Args:
      text: lists `{{0,1},{2,3}}`, iota `[2,4]<=[4,2]T(1,0)`, a mesh and its axes
        `mesh['a'=2,'b'=4] {'b'}`, or an empty text for one group of all devices.
      num_devices: of the module.

    Returns:
      The members of each group.

    Raises:
      ValueError: the text has none of these forms.

    Examples:
      >>> [group.tolist() for group in replica_groups("[2,2]<=[2,2]T(1,0)", 4)]
      [[0, 2], [1, 3]]
      >>> [group.tolist() for group in replica_groups("mesh['a'=2,'b'=2] {'a'}", 4)]
      [[0, 2], [1, 3]]
    """
    if not re.search(r"\d", text):
        return [np.arange(num_devices)]
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if "<=" in text:
        return list(_iota(text).reshape(_dims(text)))
    if re.fullmatch(r"\{(\s*\{[\d,\s]*\}\s*,?)+\}", text):
        lists = re.findall(r"\{([\d,\s]+)\}", text)
        return [np.array(each.split(","), dtype=np.int64) for each in lists]
    if re.fullmatch(r"\{[\d,\s]+\}", text):
        return [np.array(text[1:-1].split(","), dtype=np.int64)]
    raise ValueError(
        f"replica_groups={text[:80]} have an unknown syntax; use lists in braces, "
        "[groups,size]<=[dims]T(order), or mesh[...] {axes}."
    )


def _dims(text: str) -> list[int]:
    found = re.search(r"\[([\d,]+)\]", text)
    return [int(d) for d in found[1].split(",")] if found else []


def _iota(text: str) -> np.ndarray:
    """Returns the devices of `...<=[dims]T(order)` or `[dims]T(order)`, flat."""
    text = text.rpartition("<=")[2]
    dims = _dims(text)
    order = re.search(r"T\(([\d,]+)\)", text)
    ids = np.arange(np.prod(dims)).reshape(dims)
    if order:
        ids = ids.transpose([int(axis) for axis in order[1].split(",")])
    return ids.reshape(-1)


def _mesh_groups(text: str) -> list[np.ndarray]:
    axes = {
        name: int(size) for name, size in re.findall(r"['\"]([^'\"]+)['\"]=(\d+)", text)
    }
    ids = np.arange(int(np.prod(list(axes.values()))))
    given = re.search(r"device_ids=\(([^{]*)\)", text)
    if given:
        flat = "[" not in given[1]
        ids = np.array(given[1].split(","), dtype=int) if flat else _iota(given[1])
    # `'a':(2)4` is the factor 4 of the size of axis a, behind a factor of 2.
    reduced = re.findall(
        r"['\"]([^'\"=]+)['\"](?::\((\d+)\)(\d+))?", text.rpartition("{")[2]
    )
    cuts = {name: (int(pre), int(size)) for name, pre, size in reduced if pre}
    dims, grouped = [], []
    for name, size in axes.items():
        wanted = any(name == each for each, _, _ in reduced)
        pre, part = cuts.get(name, (1, size if wanted else 1))
        dims += [pre, part, size // (pre * part)]
        grouped += [False, wanted, False]
    outer = [axis for axis, inside in enumerate(grouped) if not inside]
    inner = [axis for axis, inside in enumerate(grouped) if inside]
    size = int(np.prod([dims[axis] for axis in inner]))
    return list(ids.reshape(dims).transpose(outer + inner).reshape(-1, size))
