"""Reads the text of compiled modules."""

import math
import re


def computations(text):
    """Maps each computation of an HLO module to its lines; the entry is 'ENTRY'."""
    found, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif line.startswith("  ") and name:
            found[name].append(line.strip())
    return found


def in_loops(found):
    """Returns the computations that run inside a loop, called ones included."""
    callee = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)")
    branches = re.compile(r"branch_computations=\{([^}]*)\}")
    reached = set()
    pending = [
        name
        for line in found["ENTRY"]
        if " while(" in line
        for name in callee.findall(line)
    ]
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        for line in found[name]:
            pending += callee.findall(line)
            for names in branches.findall(line):
                pending += [part.strip(" %") for part in names.split(",")]
    return reached


def copies_of(found, names):
    """Maps (computation, line) of all copies in some computations to bytes."""
    copies = {}
    for name in names:
        for line in found[name]:
            copy = re.search(r"= \(?(\w+)\[([\d,]*)\][^=]* copy(?:-start)?\(", line)
            if copy:
                dims = (int(d) for d in copy[2].split(",") if d)
                copies[name, line] = _itemsize(copy[1]) * math.prod(dims)
    return copies


def _itemsize(dtype):
    bits = re.search(r"\d+", dtype)  # pred has none
    return max(1, int(bits[0]) // 8) if bits else 1
