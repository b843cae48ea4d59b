"""A `Program` as the smallest code that runs it: one body each for F, I and W.

Where communication is not hidden under compute (CPU devices), the bodies of overlapped
pairs and of steady states bring nothing, and compiling them takes most of the time.
Here every tick runs the same code: F, then I, then W, each under a guard. A pair runs
as F, then B; a B runs as I, then W. Ticks, permutes and slots are those of the program.

Both chunks share these bodies: parameters, gradients and auxiliary outputs of a rank's
chunks are stacked on a leading axis, and a task indexes its chunk. Stages that have
functions of their own have bodies of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax.executor.runner import Row, Runner, State
from dualpipe_jax.executor.in_place import (
    accumulate,
    at,
    read,
    row_major,
    when,
    write,
    write_at,
)
from dualpipe_jax.lowering import Program

PyTree = Any


class Tasks(NamedTuple):
    """Which tasks run in a tick: int32, [num_ticks, num_ranks] or one rank's scalars.

    Fields of tasks that a tick lacks hold 0.
    """

    forward: np.ndarray | jax.Array  # 1 where F runs
    backward_input: np.ndarray | jax.Array  # 1 where I runs, alone or as half of a B
    backward_weights: np.ndarray | jax.Array  # 1 where W runs, alone or as half of a B
    f_chunk: np.ndarray | jax.Array
    b_chunk: np.ndarray | jax.Array  # of I, W or B
    f_variant: np.ndarray | jax.Array
    b_variant: np.ndarray | jax.Array
    wgrad_slot: np.ndarray | jax.Array  # what I keeps for W; of a B the spare slot


class CompactRunner(Runner):
    """Runs each tick as F, then I, then W; see the module's docstring."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        table = tasks_of(self.program, self.variants)
        self.plan = Tasks(*(jnp.asarray(field)[:, self.rank] for field in table))
        self.used = [
            sorted(set(variant[runs == 1].tolist()))
            for runs, variant in (
                (table.forward, table.f_variant),
                (table.backward_input, table.b_variant),
                (table.backward_weights, table.b_variant),
            )
        ]

    @staticmethod
    def num_wgrad_slots(program: Program) -> int:
        """The program's, and a spare one for every B, which runs as I, then W."""
        whole = any("B" in dict(kind) for kind in program.kinds)
        return program.num_weight_slots + whole

    @staticmethod
    def pack(chunks: tuple[PyTree, ...]) -> PyTree:
        """A rank's chunks in one tree, leaves [num_chunks, ...]."""
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunks)

    def unpack(self, chunks: PyTree) -> tuple[PyTree, ...]:
        """The inverse of `pack`."""
        return tuple(
            jax.tree.map(lambda leaf, c=c: leaf[c], chunks)
            for c in range(len(self.program.chunks[0]))
        )

    def run(self, state: State) -> State:
        """The state after the last tick."""
        choice, permutes = self.permutes_in(np.arange(self.program.num_ticks))

        def tick(number, state):
            row = self.row(number)
            state = self.embed(row, state)
            state = self.tasks(number, row, state)
            state = self.finish(row, state, read(state.messages, row.f_out))
            state = self.embed_backward(row, state)
            return self.exchange(row, state, permutes(jnp.asarray(choice)[number]))

        return lax.fori_loop(0, self.program.num_ticks, tick, state)

    def run_costliest(self, state: State) -> State:
        """Runs F, I and W once, in the first tick; none needs the memory of another."""
        tick = jnp.int32(0)
        return self.tasks(tick, self.row(tick), state)

    def tasks(self, tick: jax.Array, row: Row, state: State) -> State:
        """Runs this rank's tasks of a tick."""
        plan = Tasks(
            *(lax.dynamic_index_in_dim(f, tick, keepdims=False) for f in self.plan)
        )
        forward, backward_input, backward_weights = self.used
        # Before F writes: of a pair, F's output may take the slot of B's input.
        dy = read(state.messages, row.b_in) if backward_input else None
        for variant in forward:
            state = self._forward(variant, plan, row, state)
        for variant in backward_input:
            state = self._backward_input(variant, plan, row, dy, state)
        for variant in backward_weights:
            state = self._backward_weights(variant, plan, row, state)
        return state

    def _runs(self, runs: jax.Array, variant: int, here: jax.Array) -> jax.Array:
        runs = runs == 1
        return runs & (here == variant) if len(self.work.stages) > 1 else runs

    def _forward(self, variant: int, plan: Tasks, row: Row, state: State) -> State:
        stage = self.work.stages[variant]

        def body(carry):
            chunks, (messages, residuals, aux) = row_major((self.chunks, carry))
            y, new_aux, saved = stage.forward(
                read(chunks, plan.f_chunk),
                read(messages, row.f_in),
                self.stages[plan.f_chunk],
                row.f_microbatch,
            )
            mine = self.add_aux(read(aux, plan.f_chunk), new_aux, row.f_microbatch)
            if not self.forward_only:
                residuals = write_at(residuals, stage.residuals, row.f_slot, saved)
            messages = write(messages, row.f_out, y)
            return row_major((messages, residuals, write(aux, plan.f_chunk, mine)))

        messages, residuals, aux = when(
            self._runs(plan.forward, variant, plan.f_variant),
            body,
            (state.messages, state.residuals, state.stage_aux),
        )
        return state._replace(messages=messages, residuals=residuals, stage_aux=aux)

    def _backward_input(
        self, variant: int, plan: Tasks, row: Row, dy: PyTree, state: State
    ) -> State:
        stage = self.work.stages[variant]

        def body(carry):
            chunks, (messages, residuals, kept) = row_major((self.chunks, carry))
            dx, crossing = stage.backward_input(
                read(chunks, plan.b_chunk),
                read(at(residuals, stage.residuals), row.b_slot),
                dy,
            )
            kept = write_at(kept, stage.crossing, plan.wgrad_slot, crossing)
            return row_major((write(messages, row.b_out, dx), residuals, kept))

        messages, residuals, kept = when(
            self._runs(plan.backward_input, variant, plan.b_variant),
            body,
            (state.messages, state.residuals, state.queue),
        )
        return state._replace(messages=messages, residuals=residuals, queue=kept)

    def _backward_weights(
        self, variant: int, plan: Tasks, row: Row, state: State
    ) -> State:
        stage = self.work.stages[variant]

        def body(carry):
            chunks, (residuals, kept) = row_major((self.chunks, carry[:2]))
            grads = carry[2]
            new = stage.backward_weights(
                read(chunks, plan.b_chunk),
                read(at(residuals, stage.residuals), row.b_slot),
                read(at(kept, stage.crossing), plan.wgrad_slot),
            )
            mine = accumulate(read(grads, plan.b_chunk), new)
            return *row_major((residuals, kept)), write(grads, plan.b_chunk, mine)

        residuals, kept, grads = when(
            self._runs(plan.backward_weights, variant, plan.b_variant),
            body,
            (state.residuals, state.queue, state.stage_grads),
        )
        return state._replace(residuals=residuals, queue=kept, stage_grads=grads)


def tasks_of(program: Program, variants: tuple[int, ...]) -> Tasks:
    """The tasks of every tick and rank, with each B as I and W."""
    tasks = Tasks(
        *(np.zeros(program.table.kind.shape, np.int32) for _ in Tasks._fields)
    )
    tasks.wgrad_slot[:] = program.table.queue
    for (tick, rank), number in np.ndenumerate(program.table.kind):
        for op, chunk in program.kinds[number] if number >= 0 else ():
            where = (tick, rank)
            variant = variants[program.chunks[rank][chunk]]
            if op == "F":
                tasks.forward[where] = 1
                tasks.f_chunk[where], tasks.f_variant[where] = chunk, variant
                continue
            tasks.backward_input[where] = op in "BI"
            tasks.backward_weights[where] = op in "BW"
            tasks.b_chunk[where], tasks.b_variant[where] = chunk, variant
            if op == "B":
                tasks.wgrad_slot[where] = program.num_weight_slots
    return tasks
