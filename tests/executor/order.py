"""Which collectives of a compiled program XLA may run in either order.

Reads the text of optimized HLO. Two operations of a computation have an order if one
needs the other's result.
"""

import re

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*)$")
_KIND = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9-]*)\(")


def without_order(text):
    """Pairs of a loop or branch with collectives, and a collective beside it.

    The other pairs of collectives are in order: those of one computation always are.
    """
    computations = dict(_computations(text))
    inside = {}

    def has_collectives(name):
        if name not in inside:
            inside[name] = False
            inside[name] = any(
                kind in COLLECTIVES or any(map(has_collectives, called))
                for kind, _, called in computations.get(name, {}).values()
            )
        return inside[name]

    pairs = []
    for operations in computations.values():
        blocks, alone = [], []
        for name, (kind, _, called) in operations.items():
            if kind in COLLECTIVES:
                alone.append(name)
            elif kind in ("while", "conditional", "call") and any(
                map(has_collectives, called)
            ):
                blocks.append(name)
        for i, block in enumerate(blocks):
            for other in alone + blocks[i + 1 :]:
                if not (
                    _needs(operations, block, other) or _needs(operations, other, block)
                ):
                    pairs.append((block, other))
    return pairs


def _computations(text):
    name, operations = None, {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = re.match(r"(?:ENTRY )?%?([\w.-]+)", line)[1]
            operations = {}
        elif line.startswith("}") and name:
            yield name, operations
            name = None
        elif found := _OPERATION.match(line):
            rest = found[2].partition(", metadata=")[0]
            kind = _KIND.search(rest)
            called = re.findall(
                r"(?:body|condition|to_apply|calls|branch_computations)="
                r"(\{[^}]*\}|%[\w.-]+)",
                rest,
            )
            called = re.findall(r"%([\w.-]+)", " ".join(called))
            used = re.findall(r"%([\w.-]+)", rest)
            operations[found[1]] = (kind[1] if kind else "", used, called)


def _needs(operations, name, other):
    """Whether an operation needs the result of another one."""
    seen, left = set(), [name]
    while left:
        for used in operations[left.pop()][1]:
            if used == other:
                return True
            if used in operations and used not in seen:
                seen.add(used)
                left.append(used)
    return False
