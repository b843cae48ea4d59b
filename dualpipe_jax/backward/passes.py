"""A pass cut at its large exchanges, and what its equations take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dualpipe_jax.backward.flop_count import equation_flops
from dualpipe_jax.backward.jaxprs import Kind, is_var, kind, live_vars, nbytes

# What exchanges rows between devices, with nothing of its own to compute.
EXCHANGES = frozenset({"all_to_all", "ragged_all_to_all"})

# Costs are in bytes of memory traffic, of an H100: 989 TFLOP/s of bfloat16, 3.35 TB/s,
# of which kernels reach 70 %, and 50 GB/s of network. Only their ratios matter, which
# hardly differ between GPUs.
_FLOPS_A_BYTE = 300
_NETWORK = 47
# Of the largest exchange: what is worth a turn of its own.
_LARGE = 1 / 8


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass, cut at its large exchanges.

    Attributes:
      eqns: all of it.
      sends: the large exchanges, in their order; several and what is between them
        where that multiplies nothing.
      pieces: one more than there are sends; a piece runs between two of them.
      free: what no input cotangent needs.
    """

    eqns: list[Any]
    sends: list[list[Any]]
    pieces: list[list[Any]]
    free: list[Any]

    def made(self) -> dict[Any, int]:
        """The piece that makes each variable; results of an exchange come after it."""
        parts = [*enumerate(self.pieces), *enumerate(self.sends, 1)]
        return {v: k for k, part in parts for eqn in part for v in eqn.outvars}

    def joined(self) -> Pass:
        """With the exchanges joined that are two hops of one way."""
        sends, pieces = [], [self.pieces[0]]
        for send, piece in zip(self.sends, self.pieces[1:], strict=True):
            if sends and not any(map(_multiplies, pieces[-1])):
                sends[-1] = [*sends[-1], *pieces.pop(), *send]
            else:
                sends.append(send)
            pieces.append(piece)
        return dataclasses.replace(self, sends=sends, pieces=pieces)

    @classmethod
    def of_forward(
        cls,
        jaxpr: Any,
        weights: Collection[Any] | None = None,
        made: Mapping[Any, int] | None = None,
    ) -> Pass:
        """Each equation as early as its operands are there.

        Args:
          jaxpr: the pass.
          weights: inputs; what is made of them alone, to cut or to cast them, waits
            until somebody wants it. None: it does not.
          made: of a pass that is ahead, whose results this one reads.
        """
        sends = _large_exchanges(jaxpr)
        number = {id(eqn): i for i, eqn in enumerate(sends)}
        there: dict[Any, int] = dict(made or {})
        still = set(weights or ())
        levels: list[int | None] = []
        for eqn in jaxpr.eqns:
            reads = list(filter(is_var, eqn.invars))
            if weights is not None and still.issuperset(reads):
                still.update(eqn.outvars)
                levels.append(None)
                continue
            level = max((there.get(v, 0) for v in reads), default=0)
            if id(eqn) in number:
                level = number[id(eqn)] + 1
            levels.append(level)
            there.update((v, level) for v in eqn.outvars)
        until: dict[Any, int] = {}
        pieces: list[list[Any]] = [[] for _ in range(len(sends) + 1)]
        for eqn, level in reversed(list(zip(jaxpr.eqns, levels, strict=True))):
            if level is None:
                level = min(until.get(v, len(sends)) for v in eqn.outvars)
            is_send = id(eqn) in number
            for v in filter(is_var, eqn.invars):
                until[v] = min(until.get(v, len(sends)), level - is_send)
            if not is_send:
                pieces[level].append(eqn)
        pieces = [piece[::-1] for piece in pieces]
        return cls(jaxpr.eqns, [[eqn] for eqn in sends], pieces, [])

    @classmethod
    def of_backward(cls, jaxpr: Any, num_needed: int) -> Pass:
        """Each equation as late as its users allow: less is kept for less long."""
        sends = _large_exchanges(jaxpr)
        number = {id(eqn): i for i, eqn in enumerate(sends)}
        is_needed = [i < num_needed for i in range(len(jaxpr.outvars))]
        needed = live_vars(jaxpr, is_needed, roots=sends, whole=True)
        pieces: list[list[Any]] = [[] for _ in range(len(sends) + 1)]
        free: list[Any] = []
        until: dict[Any, int] = {}
        for eqn in reversed(jaxpr.eqns):
            if id(eqn) in number:
                level = number[id(eqn)]
            elif not any(v in needed for v in eqn.outvars):
                free.append(eqn)
                continue
            else:
                level = min(until.get(v, len(sends)) for v in eqn.outvars)
                pieces[level].append(eqn)
            for v in filter(is_var, eqn.invars):
                until[v] = min(until.get(v, len(sends)), level)
        pieces = [piece[::-1] for piece in pieces]
        return cls(jaxpr.eqns, [[eqn] for eqn in sends], pieces, free[::-1])


def cost_of(eqn: Any) -> float:
    """Time, as bytes of memory traffic; what is no product is fused mostly."""
    written = sum(nbytes(v.aval) for v in eqn.outvars)
    if eqn.primitive.name == "pallas_call":
        # Its loops have trip counts that nobody knows before they run. The product of
        # [m, k] and [k, n] takes 2 m k n, twice the root of its three arrays' sizes; a
        # few groups, or a causal mask, halve it.
        arrays = [a.aval for a in (*eqn.invars, *eqn.outvars)]
        sizes = sorted(math.prod(getattr(a, "shape", ())) for a in arrays)[-3:]
        return max(math.sqrt(math.prod(sizes)) / _FLOPS_A_BYTE, written)
    if kind(eqn) == Kind.FIXED:  # gathers, scatters and sorts read, too
        return 2 * written
    return max(equation_flops(eqn) / _FLOPS_A_BYTE, written / 4)


def time_of(eqns: Sequence[Any]) -> float:
    """Of exchanges and what is between them, in the unit of `cost_of`."""
    exchanges = [eqn for eqn in eqns if eqn.primitive.name in EXCHANGES]
    return _NETWORK * sum(map(_sent, exchanges))


def _sent(eqn: Any) -> int:
    """Bytes of an exchange: one of its two buffers may be larger than what travels."""
    return min(nbytes(eqn.invars[0].aval), nbytes(eqn.outvars[0].aval))


def _multiplies(eqn: Any) -> bool:
    """Whether it is a product of matrices, a kernel, or a loop that may hold either."""
    name = eqn.primitive.name
    return name in ("dot_general", "pallas_call", "while", "scan", "ragged_dot_general")


def _large_exchanges(jaxpr: Any) -> list[Any]:
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in EXCHANGES]
    largest = max(map(_sent, found), default=0)
    return [eqn for eqn in found if _sent(eqn) >= _LARGE * largest]
