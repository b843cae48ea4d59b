"""A pass cut at its large exchanges, and the costs of its equations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from dualpipe_jax.backward.flop_count import equation_flops
from dualpipe_jax.backward.jaxprs import Kind, is_var, kind, live_vars, nbytes

# Primitives that exchange rows between devices without any compute.
EXCHANGES = frozenset({"all_to_all", "ragged_all_to_all"})

# Costs are in bytes of memory traffic on an H100: 989 TFLOP/s in bfloat16, 3.35 TB/s,
# of which kernels reach 70 %, and a network of 50 GB/s. Only their ratios matter, which
# hardly differ between GPUs.
_FLOPS_A_BYTE = 300
_NETWORK = 47
# Fraction of the largest exchange from which an exchange gets its own turn.
_LARGE = 1 / 32


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass, cut at its large exchanges.

    Attributes:
      eqns: all equations.
      sends: the large exchanges, in order. Those that wait for the same ones, such as
        the tokens and the weights of a layer, form one send.
      pieces: the equations before, between and after the sends.
      free: equations that no input cotangent needs.
    """

    eqns: list[Any]
    sends: list[list[Any]]
    pieces: list[list[Any]]
    free: list[Any]

    def made(self) -> dict[Any, int]:
        """Returns the first piece in or after which each variable is available."""
        parts = [*enumerate(self.pieces), *enumerate(self.sends, 1)]
        return {v: k for k, part in parts for eqn in part for v in eqn.outvars}

    def joined(self) -> Pass:
        """Returns the pass with the two hops of one transfer joined to one send."""
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
        """Places each equation as early as its operands allow.

        Args:
          jaxpr: the pass.
          weights: inputs that are weights; equations that depend on them only, such as
            slices and casts, run where they are first needed. None: as early as others.
          made: `made()` of a pass that is ahead, whose results this one reads.
        """
        group, num_sends = _group_exchanges(jaxpr)
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
            if id(eqn) in group:
                level = group[id(eqn)] + 1
            levels.append(level)
            there.update((v, level) for v in eqn.outvars)
        until: dict[Any, int] = {}
        sends: list[list[Any]] = [[] for _ in range(num_sends)]
        pieces: list[list[Any]] = [[] for _ in range(num_sends + 1)]
        for eqn, level in reversed(list(zip(jaxpr.eqns, levels, strict=True))):
            if level is None:
                level = min(until.get(v, num_sends) for v in eqn.outvars)
            is_send = id(eqn) in group
            for v in filter(is_var, eqn.invars):
                until[v] = min(until.get(v, num_sends), level - is_send)
            (sends[level - 1] if is_send else pieces[level]).append(eqn)
        sends, pieces = ([part[::-1] for part in parts] for parts in (sends, pieces))
        return cls(jaxpr.eqns, sends, pieces, [])

    @classmethod
    def of_backward(cls, jaxpr: Any, num_needed: int) -> Pass:
        """Places each equation as late as its users allow, so that less is kept."""
        is_needed = [i < num_needed for i in range(len(jaxpr.outvars))]
        needed = live_vars(jaxpr, is_needed, whole=True)
        group, num_sends = _group_exchanges(jaxpr, needed)
        sends: list[list[Any]] = [[] for _ in range(num_sends)]
        pieces: list[list[Any]] = [[] for _ in range(num_sends + 1)]
        free: list[Any] = []
        until: dict[Any, int] = {}
        for eqn in reversed(jaxpr.eqns):
            if not any(v in needed for v in eqn.outvars):
                free.append(eqn)
                continue
            if id(eqn) in group:
                level = group[id(eqn)]
                sends[level].append(eqn)
            else:
                level = min(until.get(v, num_sends) for v in eqn.outvars)
                pieces[level].append(eqn)
            for v in filter(is_var, eqn.invars):
                until[v] = min(until.get(v, num_sends), level)
        sends, pieces = ([part[::-1] for part in parts] for parts in (sends, pieces))
        return cls(jaxpr.eqns, sends, pieces, free[::-1])


def cost_of(eqn: Any) -> float:
    """Returns the time as bytes of memory traffic; most non-products are fused."""
    written = sum(nbytes(v.aval) for v in eqn.outvars)
    if eqn.primitive.name == "pallas_call":
        # The trip counts of its loops are unknown before they run. The product of
        # [m, k] and [k, n] takes 2 m k n, twice the root of its three arrays' sizes; a
        # few groups, or a causal mask, halve it.
        arrays = [a.aval for a in (*eqn.invars, *eqn.outvars)]
        sizes = sorted(math.prod(getattr(a, "shape", ())) for a in arrays)[-3:]
        return max(math.sqrt(math.prod(sizes)) / _FLOPS_A_BYTE, written)
    if kind(eqn) == Kind.FIXED:  # gathers, scatters and sorts read too
        return 2 * written
    return max(equation_flops(eqn) / _FLOPS_A_BYTE, written / 4)


def time_of(eqns: Sequence[Any]) -> float:
    """Returns the time of exchanges and equations between them, as `cost_of` does."""
    exchanges = [eqn for eqn in eqns if eqn.primitive.name in EXCHANGES]
    return _NETWORK * sum(map(_sent, exchanges))


def _sent(eqn: Any) -> int:
    """Returns the bytes of an exchange; one of its buffers may exceed what is sent."""
    return min(nbytes(eqn.invars[0].aval), nbytes(eqn.outvars[0].aval))


def _multiplies(eqn: Any) -> bool:
    """Whether it is a matrix product, a kernel, or a loop that may contain either."""
    name = eqn.primitive.name
    return name in ("dot_general", "pallas_call", "while", "scan", "ragged_dot_general")


def _group_exchanges(
    jaxpr: Any, needed: Set[Any] | None = None
) -> tuple[dict[int, int], int]:
    """Numbers the large exchanges by the sends that they belong to.

    Those that the same number of others wait for, one after another, are one send: an
    exchange of weights joins that of the tokens that they multiply.

    Args:
      jaxpr: the pass.
      needed: variables; exchanges of other ones are left out. None: of all.

    Returns:
      By the `id` of an exchange the number of its send, and the number of sends.
    """
    exchanges = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in EXCHANGES]
    if needed is not None:
        exchanges = [e for e in exchanges if not needed.isdisjoint(e.outvars)]
    largest = max(map(_sent, exchanges), default=0)
    large = {id(eqn) for eqn in exchanges if _sent(eqn) >= _LARGE * largest}
    after: dict[Any, int] = {}
    height: dict[int, int] = {}
    for eqn in reversed(jaxpr.eqns):
        level = max((after.get(v, 0) for v in eqn.outvars), default=0)
        if id(eqn) in large:
            level += 1
            height[id(eqn)] = level
        for v in filter(is_var, eqn.invars):
            after[v] = max(after.get(v, 0), level)
    highest = max(height.values(), default=0)
    return {eqn: highest - level for eqn, level in height.items()}, highest
