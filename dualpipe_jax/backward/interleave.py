"""Interleaves two passes, so that each computes while the other communicates.

DeepSeek's order inside an overlapped pair (arXiv:2412.19437, section 3.2.1, figure 4):
attention and experts of one direction run during dispatch and combine of the other.
XLA's scheduler does not find this order: it takes both passes as they come, and leaves
the ends of most exchanges exposed. Here the order is decided on the jaxprs. Both are
cut at their large exchanges and their pieces take turns; equations that are free to
move (weight gradients, recomputation) fill turns that have less compute than
communication. An `optimization_barrier` between two turns fixes the order, so that
within a turn XLA can only overlap.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend import core as jex_core

from dualpipe_jax import compat
from dualpipe_jax.backward.flatten import Builder
from dualpipe_jax.backward.jaxprs import (
    barrier_equation,
    dce,
    is_barrier,
    is_var,
    real_effects,
)
from dualpipe_jax.backward.passes import EXCHANGES, Pass, cost_of, time_of

# Fraction of a turn's communication that is worth filling, or filling with.
_WORTH = 1 / 50


def interleave(forward: Any, backward: Any, num_needed: int) -> Any | None:
    """Interleaves a forward and a backward pass in one program.

    Args:
      forward: flat jaxpr.
      backward: flat jaxpr; a variable that also occurs in `forward` is unrelated.
      num_needed: number of leading outputs of `backward` that the previous stage waits
        for; the others are weight gradients.

    Returns:
      A jaxpr from the inputs of both to the outputs of both, in this order; None where
      there is no order to decide: neither pass exchanges rows between devices outside
      its loops and branches, or one of them prints.
    """
    forward, backward = _on_its_own(forward), _on_its_own(backward)
    if any(real_effects(eqn) for eqn in (*forward.eqns, *backward.eqns)):
        return None
    passes = Pass.of_forward(forward), Pass.of_backward(backward, num_needed)
    if not any(each.sends for each in passes):
        return None
    forward_pass, backward_pass = passes
    turns = _turns(forward_pass, backward_pass)
    turns.append(_Turn([], _fill(turns, backward_pass)))
    eqns, outs = _in_order(_tidy(turns), [*forward.outvars, *backward.outvars])
    invars = [*forward.invars, *backward.invars]
    return compat.new_jaxpr(invars, outs, eqns, forward)


def interleave_forwards(
    first: Any, second: Any, num_weights: tuple[int, int], num_handed: int
) -> Any | None:
    """Interleaves two forward passes in one program; the first is half a layer ahead.

    Args:
      first: flat jaxpr; its last `num_handed` outputs are for the second.
      second: flat jaxpr; its last `num_handed` inputs are these outputs.
      num_weights: number of leading inputs of each that are weights.
      num_handed: number of values passed from the first to the second. The second pass
        reads a value in its piece k if the first computes it in piece k or before.

    Returns:
      A jaxpr from the inputs of both to the outputs of both, without the values passed
      between them; None as for `interleave`, and where the second pass would wait.
    """
    first, second = _on_its_own(dce(first)), _on_its_own(dce(second))
    if any(real_effects(eqn) for eqn in (*first.eqns, *second.eqns)):
        return None
    given = len(second.invars) - num_handed
    kept = len(first.outvars) - num_handed
    handed = dict(zip(second.invars[given:], first.outvars[kept:], strict=True))
    second = _substitute(second, handed)
    ahead = Pass.of_forward(first, first.invars[: num_weights[0]])
    behind = Pass.of_forward(second, second.invars[: num_weights[1]], ahead.made())
    if not ahead.sends and not behind.sends:
        return None
    outs = [*first.outvars[:kept], *second.outvars]
    turns = _tidy(_turns(behind.joined(), ahead.joined()))
    if not _is_in_order(turns):  # a value is computed after the second pass needs it
        return None
    eqns, outs = _in_order(turns, outs)
    return compat.new_jaxpr([*first.invars, *second.invars[:given]], outs, eqns, first)


def _is_in_order(turns: Sequence[_Turn]) -> bool:
    """Whether every value is computed before it is read."""
    waiting = {v for turn in turns for eqn in turn.all() for v in eqn.outvars}
    for eqn in (eqn for turn in turns for eqn in turn.all()):
        if not waiting.isdisjoint(filter(is_var, eqn.invars)):
            return False
        waiting.difference_update(eqn.outvars)
    return True


def _substitute(jaxpr: Any, values: Mapping[Any, Any]) -> Any:
    """Returns the jaxpr with some variables replaced by other atoms."""

    def read(atom: Any) -> Any:
        return values.get(atom, atom) if is_var(atom) else atom

    eqns = [eqn.replace(invars=[read(a) for a in eqn.invars]) for eqn in jaxpr.eqns]
    return compat.new_jaxpr(jaxpr.invars, list(map(read, jaxpr.outvars)), eqns, jaxpr)


@dataclasses.dataclass
class _Turn:
    """Communication of one pass, and the equations that run beside it."""

    send: list[Any]
    eqns: list[Any]

    def all(self) -> list[Any]:
        return [*self.send, *self.eqns]


def _turns(forward: Pass, backward: Pass) -> list[_Turn]:
    """Puts forward piece k beside exchange k of the backward pass, and backward piece
    k + 1 beside exchange k of the forward pass. Of two forward passes, `forward` is the
    one behind and `backward` the one ahead.
    """
    turns = [_Turn([], _nth(backward.pieces, 0))]
    for k in range(max(len(forward.pieces), len(backward.pieces))):
        turns.append(_Turn(_nth(backward.sends, k), _nth(forward.pieces, k)))
        turns.append(_Turn(_nth(forward.sends, k), _nth(backward.pieces, k + 1)))
    return turns


def _tidy(turns: Sequence[_Turn]) -> list[_Turn]:
    return _small_first([turn for turn in turns if turn.all()])


def _fill(turns: list[_Turn], backward: Pass) -> list[Any]:
    """Moves backward equations to earlier turns that have too little compute.

    Free equations move first, then those of later turns. Returns the free ones that are
    left.
    """
    cost = {id(eqn): cost_of(eqn) for turn in turns for eqn in turn.eqns}
    cost |= {id(eqn): cost_of(eqn) for eqn in backward.free}
    order = {id(eqn): i for i, eqn in enumerate(backward.eqns)}
    makers = {v: eqn for eqn in backward.eqns for v in eqn.outvars}
    at = {id(eqn): t for t, turn in enumerate(turns) for eqn in turn.all()}
    free = {id(eqn): eqn for eqn in backward.free}
    for t, turn in enumerate(turns):
        if not turn.send:
            continue
        time = time_of(turn.send)
        gap = time - sum(cost[id(eqn)] for eqn in turn.eqns)
        later = [eqn for other in turns[t + 1 :] for eqn in other.eqns]
        for eqn in [*free.values(), *(e for e in later if id(e) in order)]:
            if gap <= _WORTH * time:
                break
            if at.get(id(eqn), len(turns)) <= t or cost[id(eqn)] < _WORTH * time:
                continue
            moved = _with_operands(eqn, makers, at, t)
            if moved is None or sum(cost[i] for i in moved) > 1.5 * gap:
                continue
            for other in turns[t + 1 :]:
                other.eqns = [e for e in other.eqns if id(e) not in moved]
            turn.eqns += sorted(moved.values(), key=lambda e: order[id(e)])
            gap -= sum(cost[i] for i in moved)
            at.update((i, t) for i in moved)
            free = {i: e for i, e in free.items() if i not in moved}
    return list(free.values())


def _with_operands(
    eqn: Any, makers: dict[Any, Any], at: dict[int, int], turn: int
) -> dict[int, Any] | None:
    """Returns `eqn` and its dependencies that have not run by `turn`; None if one of
    them is an exchange. An exchange in flight in that turn has not run yet.
    """

    def is_there(each: Any) -> bool:
        is_exchange = each.primitive.name in EXCHANGES
        return at.get(id(each), sys.maxsize) <= turn - is_exchange

    found = _closure(eqn, makers, is_there)
    if any(each.primitive.name in EXCHANGES for each in found.values()):
        return None
    return found


def _small_first(turns: Sequence[_Turn]) -> list[_Turn]:
    """Moves the small exchanges that a turn waits for to a separate turn before it.

    On the link they would follow the large exchange, and their readers would wait for
    both.
    """
    result = []
    for turn in turns:
        makers = {v: eqn for eqn in turn.all() for v in eqn.outvars}
        read = {v for eqn in turn.all() for v in eqn.invars if is_var(v)}
        first: dict[int, Any] = {}
        for eqn in turn.eqns:
            is_small = eqn.primitive.name in EXCHANGES
            if not turn.send or not is_small or not read.intersection(eqn.outvars):
                continue
            needed = _closure(eqn, makers)
            if any(id(each) in needed for each in turn.send):
                continue
            time = sum(map(cost_of, needed.values()))
            if time <= _WORTH * time_of(turn.send):
                first |= needed
        if first:
            result.append(_Turn([], [e for e in turn.eqns if id(e) in first]))
            turn.eqns = [eqn for eqn in turn.eqns if id(eqn) not in first]
        result.append(turn)
    return result


def _closure(
    eqn: Any,
    makers: dict[Any, Any],
    is_there: Callable[[Any], bool] = lambda eqn: False,
) -> dict[int, Any]:
    """Returns an equation and its dependencies among these that have not run yet."""
    found: dict[int, Any] = {}
    pending = [eqn]
    while pending:
        each = pending.pop()
        if id(each) not in found and not is_there(each):
            found[id(each)] = each
            pending += [makers[v] for v in each.invars if is_var(v) and v in makers]
    return found


def _in_order(turns: Sequence[_Turn], outs: Sequence[Any]) -> tuple[list, list]:
    """Returns the equations of all turns, with barriers in between, and the results."""
    eqns: list[Any] = []
    now: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return now.get(atom, atom) if is_var(atom) else atom

    last_use = {v: len(turns) for v in outs if is_var(v)}
    for t, turn in reversed(list(enumerate(turns))):
        for eqn in turn.all():
            for v in filter(is_var, eqn.invars):
                last_use.setdefault(v, t)
    done: list[Any] = []
    for t, turn in enumerate(turns):
        # In a fixed order: all processes of a run must compile the same program.
        made = dict.fromkeys(v for eqn in turn.all() for v in eqn.outvars)
        # The results of the previous turn and the operands of this one are ready
        # before anything in this turn begins.
        reads = [v for eqn in turn.all() for v in eqn.invars if is_var(v)]
        tied = [v for v in dict.fromkeys([*done, *reads]) if v not in made]
        if done and tied:
            fresh = [jex_core.Var(v.aval) for v in tied]
            eqns.append(barrier_equation([read(v) for v in tied], fresh))
            now.update(zip(tied, fresh, strict=True))
        for eqn in turn.all():
            eqns.append(eqn.replace(invars=[read(a) for a in eqn.invars]))
        done = [v for v in made if last_use.get(v, -1) > t]
    return eqns, [read(a) for a in outs]


def _on_its_own(jaxpr: Any) -> Any:
    """Returns a copy with fresh variables and with calls inlined."""
    builder = Builder(inline_custom=True)
    invars = [jex_core.Var(v.aval) for v in jaxpr.invars]
    outs = builder.inline(jaxpr, invars)
    eqns = []
    for eqn in builder.eqns:
        if is_barrier(eqn):
            # A remat's barrier makes it wait for the cotangent; here the turns decide
            # when it runs. The rest of the barrier keeps XLA from merging the two.
            pairs = zip(eqn.invars, eqn.outvars, strict=True)
            eqns += [barrier_equation([a], [v]) for a, v in pairs]
        else:
            eqns.append(eqn)
    return compat.new_jaxpr(invars, outs, eqns, jaxpr)


def _nth(items: Sequence[list[Any]], n: int) -> list[Any]:
    """Returns a copy of item n, or an empty list."""
    return list(items[n]) if n < len(items) else []
