"""Runs a `Program` with the least code: one body for F and one for B.

Where communication is not hidden under compute (CPU devices), separate bodies for
overlapped pairs, steady states and the two halves of a backward gain nothing, and
compiling them takes most of the time. Here every tick runs the same code: F, then B,
each under a guard. A pair runs as F, then B. Where the schedule splits a backward, all
of it runs in the tick of I, and the tick of W is empty. Ticks, permutes, activation
slots and message slots are those of the program.

The chunks of a rank share these bodies: their parameters, gradients and auxiliary
outputs are stacked on a leading axis, and a task indexes its chunk. Each distinct stage
function has its own bodies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from dualpipe_jax.lowering import Program

PyTree = Any


class Tasks(NamedTuple):
    """Which tasks run in a tick: int32 scalars, or as a table [num_ticks, ...].

    Fields of tasks that a tick does not run hold 0.
    """

    forward: Any  # 1 where F runs
    backward: Any  # 1 where B or I runs
    f_chunk: Any
    b_chunk: Any
    f_variant: Any  # of `Work.stages`
    b_variant: Any


class CompactRunner(Runner):
    """Runs each tick as F, then B; see the module's docstring."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        table = tasks_of(self.program, self.variants)
        self.tasks = Tasks(*(jnp.asarray(field)[:, self.rank] for field in table))
        self.forward_variants = np.unique(table.f_variant[table.forward == 1]).tolist()
        self.backward_variants = np.unique(
            table.b_variant[table.backward == 1]
        ).tolist()

    @staticmethod
    def num_wgrad_residual_slots(program: Program) -> int:
        """Returns 0: a backward that runs whole keeps nothing for W."""
        return 0

    @staticmethod
    def pack(chunks: tuple[PyTree, ...]) -> PyTree:
        """Stacks a rank's chunks into one tree, leaves [num_chunks, ...]."""
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunks)

    def unpack(self, chunks: PyTree) -> tuple[PyTree, ...]:
        """The inverse of `pack`."""
        return tuple(
            jax.tree.map(lambda leaf, c=c: leaf[c], chunks)
            for c in range(len(self.program.chunks[0]))
        )

    def run(self, state: State) -> State:
        """Returns the state after the last tick."""
        choice, permutes = self.permutes_in(np.arange(self.program.num_ticks))

        def tick(number, state):
            row, tasks = self.row(number), read(self.tasks, number)
            state = self.embed(row, state)
            # Before F writes: in a pair, F's output may take the slot of B's input.
            dy = read(state.messages, row.b_in) if self.backward_variants else None
            for variant in self.forward_variants:
                state = self._forward(variant, tasks, row, state)
            for variant in self.backward_variants:
                state = self._backward(variant, tasks, row, dy, state)
            state = self.finish(row, state, read(state.messages, row.f_out))
            state = self.embed_backward(row, state)
            return self.exchange(row, state, permutes(jnp.asarray(choice)[number]))

        return lax.fori_loop(0, self.program.num_ticks, tick, state)

    def run_costliest(self, state: State) -> State:
        """Runs the backward of each distinct stage function, one after the other."""
        row, tasks = self.row(jnp.int32(0)), read(self.tasks, jnp.int32(0))
        for variant in self.backward_variants:
            dy = read(state.messages, row.b_in)
            state = self._backward(variant, tasks, row, dy, state)
        return state

    def _forward(self, variant: int, tasks: Tasks, row: Row, state: State) -> State:
        stage = self.work.stages[variant]

        def body(carry):
            chunks, (messages, residuals, aux) = row_major((self.chunks, carry))
            y, new_aux, saved = stage.forward(
                read(chunks, tasks.f_chunk),
                read(messages, row.f_in),
                self.stages[tasks.f_chunk],
                row.f_microbatch,
            )
            total = self.add_aux(read(aux, tasks.f_chunk), new_aux, row.f_microbatch)
            if not self.forward_only:
                residuals = write_at(residuals, stage.residuals, row.f_slot, saved)
            messages = write(messages, row.f_out, y)
            return row_major((messages, residuals, write(aux, tasks.f_chunk, total)))

        messages, residuals, aux = when(
            (tasks.forward == 1) & (tasks.f_variant == variant),
            body,
            (state.messages, state.residuals, state.stage_aux),
        )
        return state._replace(messages=messages, residuals=residuals, stage_aux=aux)

    def _backward(
        self, variant: int, tasks: Tasks, row: Row, dy: PyTree, state: State
    ) -> State:
        stage = self.work.stages[variant]

        def body(carry):
            chunks, (messages, residuals) = row_major((self.chunks, carry[:2]))
            grads = carry[2]
            new, dx = stage.backward(
                read(chunks, tasks.b_chunk),
                read(at(residuals, stage.residuals), row.b_slot),
                dy,
                row.b_microbatch,
            )
            total = accumulate(read(grads, tasks.b_chunk), new)
            messages = write(messages, row.b_out, dx)
            buffers = row_major((messages, residuals))
            return *buffers, write(grads, tasks.b_chunk, total)

        messages, residuals, grads = when(
            (tasks.backward == 1) & (tasks.b_variant == variant),
            body,
            (state.messages, state.residuals, state.stage_grads),
        )
        return state._replace(messages=messages, residuals=residuals, stage_grads=grads)


def tasks_of(program: Program, variants: tuple[int, ...]) -> Tasks:
    """Returns the tasks of every tick and rank (NumPy); W is part of its B or I."""
    tasks = Tasks(
        *(np.zeros(program.table.kind.shape, np.int32) for _ in Tasks._fields)
    )
    for where, number in np.ndenumerate(program.table.kind):
        for op, chunk in program.kinds[number] if number >= 0 else ():
            variant = variants[program.chunks[where[1]][chunk]]
            if op == "F":
                tasks.forward[where] = 1
                tasks.f_chunk[where], tasks.f_variant[where] = chunk, variant
            elif op != "W":
                tasks.backward[where] = 1
                tasks.b_chunk[where], tasks.b_variant[where] = chunk, variant
    return tasks
