"""Guesses the trip counts of loops where XLA does not know them.

Two kinds of loops can be recognised by what they carry: guards, which run at most once,
and loops over the blocks of a ragged buffer, as in a grouped product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dualpipe_jax.gpu.overlap.hlo import Computation, Module
from dualpipe_jax.gpu.overlap.instructions import Instruction
from dualpipe_jax.gpu.overlap.shapes import leaves


def is_guard(module: Module, op: Instruction) -> bool:
    """Returns whether a `while` runs at most once: its body clears its flag."""
    condition = module[op.called("condition")[0]]
    body = module[op.called("body")[0]]
    flag = condition.source(condition.root.name)
    if flag is None or flag.opcode != "get-tuple-element":
        return False
    if not flag.shape.startswith("pred[]") or body.root.opcode != "tuple":
        return False
    made = body.source(body.root.operands[int(flag.get("index"))])
    return made is not None and made.opcode == "constant" and made.literal == "false"


def blocks(module: Module) -> dict[str, float]:
    """Guesses the trips of loops that go through a buffer block by block.

    The guess: the loop, with all loops of known trips around it that carry the same
    buffer, goes through the buffer once. Of several such loops in one computation
    (whole blocks, then the remainder in smaller ones) the one with the largest blocks
    does so, and the others run once.

    Returns:
      Trips by the name of the loop's body.
    """
    found: dict[str, float] = {}
    _visit(module, module.entry, (), found)
    return found


# Of an enclosing loop: its trips, and the rows of the arrays that it carries.
_Outer = tuple[tuple[float, frozenset[int]], ...]


def _visit(
    module: Module, where: Computation, outer: _Outer, found: dict[str, float]
) -> None:
    # Rows of the buffer -> (rows of a block, name of the body).
    ragged: dict[int, list[tuple[int, str]]] = {}
    for op in where.instructions:
        if op.opcode == "while":
            body = module[op.called("body")[0]]
            known = op.backend_config.get("known_trip_count", {}).get("n")
            inside = outer
            if known is not None:
                carried = (array.dims[0] for array in leaves(op.shape) if array.dims)
                inside = (*outer, (float(known), frozenset(carried)))
            elif not is_guard(module, op):
                for rows, block in _sliced(module, body):
                    ragged.setdefault(rows, []).append((block, body.name))
            _visit(module, body, inside, found)
        else:
            for name in op.called(
                "branch_computations", "true_computation", "false_computation"
            ):
                _visit(module, module[name], outer, found)
            if op.opcode == "call":
                for name in op.called("to_apply"):
                    _visit(module, module[name], outer, found)
    # Of a body with buffers of several sizes, the smallest decides: it comes last.
    for rows in sorted(ragged, reverse=True):
        around = math.prod(trips for trips, carried in outer if rows in carried)
        largest = max(block for block, _ in ragged[rows])
        for block, name in ragged[rows]:
            found[name] = max(1.0, rows / block / around) if block == largest else 1.0


def _sliced(module: Module, body: Computation) -> Iterator[tuple[int, int]]:
    """Yields (rows of a carried buffer, rows of the block that a body accesses)."""
    for op in body.instructions:
        where, ops = body, [op]
        if op.opcode == "fusion":
            where = module[op.called("calls")[0]]
            ops = where.instructions
        for each in ops:
            if each.opcode == "dynamic-slice":
                whole, block = where.operand_shapes(each)[0], each.shape
            elif each.opcode == "dynamic-update-slice":
                whole, block = where.operand_shapes(each)[:2]
            else:
                continue
            buffers, blocks_ = leaves(whole), leaves(block)
            if buffers and blocks_ and len(buffers[0].dims) > 1:
                (rows, *columns), (part, *same) = buffers[0].dims, blocks_[0].dims
                # A block of one row indexes a stack: any order, any number of times.
                if columns == same and 1 < part < rows:
                    yield rows, part
