"""Runs a `Program` with bodies for overlapped pairs and steady states.

F and B of a pair are computed in one body, so that each can hide the communication of
the other:
- a task, or a pair, reads all its operands, then computes, then writes, so that the two
  halves of a pair do not depend on each other;
- a steady state of stages with equal functions is a separate loop, without guards.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax.executor.in_place import (
    accumulate,
    at,
    read,
    row_major,
    when,
    write,
    write_at,
)
from dualpipe_jax.executor.runner import Row, Runner, State
from dualpipe_jax.lowering import Kind, Loop

PyTree = Any
Ops = dict[str, int]  # op -> its chunk, or its variant


class OverlappedRunner(Runner):
    """Runs steady states as separate loops, and all other ticks under guards."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # Where ranks differ, a steady state is guarded as other ticks are: a separate
        # body would compile the same steps again.
        self.loops = [loop for loop in self.program.loops if self._is_alike(loop)]
        steady = np.zeros(self.program.num_ticks, bool)
        for loop in self.loops:
            steady[loop.start : loop.stop] = True
        self.general = np.flatnonzero(~steady)

    @staticmethod
    def pack(chunks: tuple[PyTree, ...]) -> PyTree:
        """The chunks as they are."""
        return chunks

    def unpack(self, chunks: PyTree) -> tuple[PyTree, ...]:
        """The chunks as they are."""
        return chunks

    def run(self, state: State) -> State:
        """Returns the state after the last tick."""
        ticks = jnp.asarray(self.general, jnp.int32)
        trips = np.zeros((len(self.loops), len(self.general)), np.int32)
        for number, loop in enumerate(self.loops):
            before = np.searchsorted(self.general, loop.start) - 1
            trips[number, before] = loop.trips
        choice, permutes = self.permutes_in(self.general)

        def body(i, state):
            tick, chosen = ticks[i], jnp.asarray(choice)[i]
            state = self._general_tick(state, tick, lambda: permutes(chosen))
            for number, loop in enumerate(self.loops):
                state = lax.fori_loop(
                    0,
                    jnp.asarray(trips[number])[i],
                    lambda trip, state, loop=loop: self._steady(loop, trip, state),
                    state,
                )
            return state

        return lax.fori_loop(0, len(self.general), body, state)

    def run_costliest(self, state: State) -> State:
        """Runs a pair if there is one, else a whole backward, else its first half."""
        kinds = self.program.kinds
        number = kinds.index(max(kinds, key=_cost))
        tick = int(np.argmax((self.program.table.kind == number).sum(1)))
        row = self.row(jnp.int32(tick))
        return self.tasks(number, np.array([tick]), row, state)

    def _general_tick(self, state: State, tick, permutes) -> State:
        row = self.row(tick)
        state = self.embed(row, state)
        for number in range(len(self.program.kinds)):
            state = self.tasks(number, self.general, row, state, row.kind == number)
        state = self.finish(row, state, read(state.messages, row.f_out))
        state = self.embed_backward(row, state)
        return self.exchange(row, state, permutes())

    def _steady(self, loop: Loop, trip: jax.Array, state: State) -> State:
        for j in range(loop.period):
            first = loop.start + j
            row = self.row(first + trip * loop.period)
            fields = self.program.table
            here = slice(first, loop.stop, loop.period)
            number = int(fields.kind[first, 0])
            if fields.f_first[here].any():
                state = self.embed(row, state)
            state = self.tasks(number, np.array([first]), row, state)
            if fields.b_first[here].any():
                state = self.embed_backward(row, state)
            # Read before a message takes its slot; see `_read` for the barrier.
            y = None
            if fields.f_last[here].any():
                y, messages = lax.optimization_barrier(
                    (read(state.messages, row.f_out), state.messages)
                )
                state = state._replace(messages=messages)
            permutes = [
                functools.partial(self.permute, pairs)
                for pairs in self.program.permutes[first]
            ]
            state = self.exchange(row, state, permutes)
            # Weight gradients stay in their tick: its permutes run under them.
            messages, grads = lax.optimization_barrier(
                (state.messages, state.stage_grads)
            )
            state = state._replace(messages=messages, stage_grads=grads)
            # The loss needs much memory: run it after these gradients are accumulated.
            if y is not None:
                state = self.finish(row, state, y)
        return state

    def tasks(
        self,
        number: int,
        ticks: np.ndarray,
        row: Row,
        state: State,
        predicate: jax.Array | None = None,
    ) -> State:
        """Runs steps of one kind, each rank with the variants of its own stages.

        Args:
          number: index of the kind.
          ticks: ticks that call this; variants that no rank runs in them are left out.
          row: this tick's row.
          state: the state before the tick's steps.
          predicate: whether this rank runs such a step; None: all ranks do.

        Returns:
          The state after them.
        """
        cases = self._cases(number, ticks)
        for case, ranks in cases.items():
            here = predicate
            if len(cases) > 1:
                mine = jnp.asarray(np.isin(np.arange(len(self.program.chunks)), ranks))
                here = mine[self.rank] if here is None else here & mine[self.rank]
            run = functools.partial(self._step, self.program.kinds[number], case, row)
            state = run(state) if here is None else when(here, run, state)
        return state

    def _cases(self, number: int, ticks: np.ndarray) -> dict[tuple[int, ...], list]:
        """Groups the ranks with steps of a kind in these ticks by their variants."""
        cases: dict[tuple[int, ...], list] = {}
        for rank in np.flatnonzero((self.program.table.kind[ticks] == number).any(0)):
            stages = self.program.chunks[rank]
            chunks = (chunk for _, chunk in self.program.kinds[number])
            case = tuple(self.variants[stages[chunk]] for chunk in chunks)
            cases.setdefault(case, []).append(rank)
        return cases

    def _is_alike(self, loop: Loop) -> bool:
        """Whether all ranks run the same variants in each tick of a steady state."""
        ticks = range(loop.start, loop.start + loop.period)
        kinds = self.program.table.kind[:, 0]
        return all(
            len(self._cases(int(kinds[tick]), np.array([tick]))) == 1 for tick in ticks
        )

    def _step(
        self, kind: Kind, variants: tuple[int, ...], row: Row, state: State
    ) -> State:
        """Runs one task, or the two of an overlapped pair side by side."""
        ops = dict(kind)
        variant = {op: v for (op, _), v in zip(kind, variants, strict=True)}
        chunks, buffers = row_major(
            (self.chunks, (state.messages, state.residuals, state.wgrad_residuals))
        )
        reads, buffers = self._read(ops, variant, row, buffers)
        results = self._compute(ops, variant, row, chunks, reads)
        return self._write(ops, variant, row, state, buffers, results)

    def _read(self, ops: Ops, variant: Ops, row: Row, buffers: tuple):
        """Returns all that the tasks read, and the buffers to write afterwards."""
        messages, residuals, for_weights = buffers
        reads = {}
        if "F" in ops:
            reads["x"] = read(messages, row.f_in)
        if "B" in ops or "I" in ops:
            reads["dy"] = read(messages, row.b_in)
        for op in {"B", "I", "W"} & set(ops):
            kept = at(residuals, self.work.stages[variant[op]].residuals)
            reads["residuals"] = read(kept, row.b_slot)
        if "W" in ops:
            kept = at(for_weights, self.work.stages[variant["W"]].wgrad_residuals)
            reads["wgrad_residuals"] = read(kept, row.wgrad_slot)
        else:
            # Without this order between a buffer's reads and writes, XLA copies it
            # whole.
            reads, messages, residuals = lax.optimization_barrier(
                (reads, messages, residuals)
            )
        return reads, (messages, residuals, for_weights)

    def _compute(
        self, ops: Ops, variant: Ops, row: Row, chunks: tuple, reads: dict[str, PyTree]
    ) -> dict[str, tuple]:
        """Returns the results of each task."""
        stages = self.work.stages
        args = {}
        if "F" in ops:
            number = self.stages[ops["F"]]
            args["F"] = (chunks[ops["F"]], reads["x"], number, row.f_microbatch)
        if "B" in ops:
            kept, dy = reads["residuals"], reads["dy"]
            args["B"] = (chunks[ops["B"]], kept, dy, row.b_microbatch)
        if "F" in args and "B" in args:
            pair = ((variant[op], args[op]) for op in "FB")
            return dict(zip("FB", self.work.pair(*pair), strict=True))
        results = {}
        if "F" in ops:
            results["F"] = stages[variant["F"]].forward(*args["F"])
        if "B" in ops:
            results["B"] = stages[variant["B"]].backward(*args["B"])
        if "I" in ops:
            results["I"] = stages[variant["I"]].backward_input(
                chunks[ops["I"]], reads["residuals"], reads["dy"], row.b_microbatch
            )
        if "W" in ops:
            grads = stages[variant["W"]].backward_weights(
                chunks[ops["W"]],
                reads["residuals"],
                reads["wgrad_residuals"],
                row.b_microbatch,
            )
            results["W"] = (grads,)
        return results

    def _write(
        self,
        ops: Ops,
        variant: Ops,
        row: Row,
        state: State,
        buffers: tuple,
        results: dict[str, tuple],
    ) -> State:
        """Returns the state with the tasks' results written to the buffers."""
        messages, residuals, for_weights = buffers
        grads, aux = list(state.stage_grads or ()), list(state.stage_aux)
        sent = []
        if "F" in ops:
            y, new_aux, saved = results["F"]
            chunk = ops["F"]
            aux[chunk] = self.add_aux(aux[chunk], new_aux, row.f_microbatch)
            sent.append((row.f_out, y))
            if not self.forward_only:
                places = self.work.stages[variant["F"]].residuals
                residuals = write_at(residuals, places, row.f_slot, saved)
        if "B" in ops:
            new, dx = results["B"]
            sent.append((row.b_out, dx))
            grads[ops["B"]] = accumulate(grads[ops["B"]], new)
        if "I" in ops:
            dx, new_kept = results["I"]
            sent.append((row.b_out, dx))
            places = self.work.stages[variant["I"]].wgrad_residuals
            for_weights = write_at(for_weights, places, row.wgrad_slot, new_kept)
        if "W" in ops:
            (new,) = results["W"]
            grads[ops["W"]] = accumulate(grads[ops["W"]], new)
        for slot, value in sent:
            messages = write(messages, slot, value)
        messages, residuals, for_weights = row_major((messages, residuals, for_weights))
        return state._replace(
            messages=messages,
            residuals=residuals,
            wgrad_residuals=for_weights,
            stage_grads=tuple(grads) if grads else state.stage_grads,
            stage_aux=tuple(aux),
        )


def _cost(kind: Kind) -> tuple:
    return (len(kind), *(op in dict(kind) for op in "BI"))
