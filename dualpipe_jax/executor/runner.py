"""The body that every device runs: a `Program` as loops, guards and permutes.

How the loops are built is decided by what XLA does with them (docs/design.md):
- a permute never stands under a predicate that differs between ranks: it would
  deadlock; which permute a tick uses is a switch on the tick, alike everywhere;
- what only some ranks do is guarded by a while loop of zero or one trip, whose
  carry aliases in place, where `lax.cond` would copy every buffer;
- a steady state is a loop of its own with neither;
- parameters and buffers are row-major in all loops, or XLA copies them between two;
- a step reads all that it needs, then computes, then writes, so that the two halves
  of an overlapped pair do not depend on each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from dualpipe_jax.executor.work import Work
from dualpipe_jax.lowering import Kind, Loop, Program

PyTree = Any


class State(NamedTuple):
    """What the loops carry. Leaves of buffers have a leading slot axis."""

    messages: PyTree  # activations and cotangents on their way between stages
    residuals: tuple[jax.Array, ...]  # from F to W
    queue: tuple[jax.Array, ...]  # from I to W
    stage_grads: tuple[PyTree, ...]  # one tree a chunk
    embed_grads: PyTree
    head_grads: PyTree
    outputs: PyTree  # [num_microbatches, ...]: losses, or what the last stage gives
    stage_aux: tuple[PyTree, ...]  # one tree a chunk
    loss_aux: PyTree


class Row(NamedTuple):
    """This rank's entries of the program's table in one tick: scalars, int32."""

    kind: jax.Array
    f_microbatch: jax.Array
    f_first: jax.Array
    f_last: jax.Array
    f_in: jax.Array
    f_out: jax.Array
    f_slot: jax.Array
    b_microbatch: jax.Array
    b_first: jax.Array
    b_in: jax.Array
    b_out: jax.Array
    b_slot: jax.Array
    queue: jax.Array
    loss_out: jax.Array
    send: jax.Array  # [rounds]
    receive: jax.Array  # [rounds]


class Runner:
    """Runs all ticks of a program on one device, inside `jax.shard_map`.

    Attributes:
      program: what to run.
      work: the functions of the model.
      variants: which of `work.stages` each stage runs.
      chunks: this rank's stage parameters, one tree a chunk.
      rank: position on the pipeline axis.
      axis_name: name of the pipeline axis.
      add_aux: adds one microbatch's auxiliary outputs to their accumulator.
    """

    def __init__(
        self,
        program: Program,
        work: Work,
        variants: tuple[int, ...],
        chunks: tuple[PyTree, ...],
        rank: jax.Array,
        axis_name: str,
        add_aux: Callable[[PyTree, PyTree, jax.Array], PyTree],
    ):
        self.program = program
        self.work = work
        self.variants = variants
        self.chunks = chunks
        self.rank = rank
        self.axis_name = axis_name
        self.add_aux = add_aux
        self.stages = jnp.asarray(np.asarray(program.chunks, np.int32))[rank]
        self.table = Row(*(jnp.asarray(field)[:, rank] for field in program.table))
        self.forward_only = program.schedule.is_forward_only
        # Where ranks differ, a steady state is guarded as other ticks are: a body of
        # its own would compile the same steps once more.
        self.loops = [loop for loop in program.loops if self._is_alike(loop)]
        steady = np.zeros(program.num_ticks, bool)
        for loop in self.loops:
            steady[loop.start : loop.stop] = True
        self.general = np.flatnonzero(~steady)
        self.patterns = [
            sorted({self._pairs(int(t), k) for t in self.general} - {()})
            for k in range(program.num_rounds)
        ]

    def _pairs(self, tick: int, k: int) -> tuple[tuple[int, int], ...]:
        groups = self.program.permutes[tick]
        return groups[k] if k < len(groups) else ()

    def run(self, state: State) -> State:
        """The state after the last tick."""
        ticks = jnp.asarray(self.general, jnp.int32)
        trips = np.zeros((len(self.loops), len(self.general)), np.int32)
        for number, loop in enumerate(self.loops):
            before = np.searchsorted(self.general, loop.start) - 1
            trips[number, before] = loop.trips
        choice = np.zeros((len(self.general), self.program.num_rounds), np.int32)
        for i, tick in enumerate(self.general):
            for k, patterns in enumerate(self.patterns):
                pairs = self._pairs(int(tick), k)
                choice[i, k] = 1 + patterns.index(pairs) if pairs else 0

        def body(i, state):
            state = self._general_tick(state, ticks[i], jnp.asarray(choice)[i])
            for number, loop in enumerate(self.loops):
                state = lax.fori_loop(
                    0,
                    jnp.asarray(trips[number])[i],
                    lambda trip, state, loop=loop: self._steady(loop, trip, state),
                    state,
                )
            return state

        return lax.fori_loop(0, len(self.general), body, state)

    def row(self, tick: jax.Array) -> Row:
        """This rank's entries of a tick."""
        return Row(
            *(lax.dynamic_index_in_dim(f, tick, keepdims=False) for f in self.table)
        )

    def _general_tick(self, state: State, tick, choice) -> State:
        row = self.row(tick)
        state = self._embed(row, state)
        for number in range(len(self.program.kinds)):
            state = self.tasks(number, self.general, row, state, row.kind == number)
        state = self._finish(row, state, read(state.messages, row.f_out))
        state = self._embed_backward(row, state)
        return self._exchange(
            row,
            state,
            [
                functools.partial(self._choose, choice[k], patterns)
                for k, patterns in enumerate(self.patterns)
            ],
        )

    def _choose(self, choice, patterns, value: PyTree) -> PyTree:
        branches = [lambda value: value]
        branches += [functools.partial(self._permute, pairs) for pairs in patterns]
        return lax.switch(choice, branches, value)

    def _permute(self, pairs, value: PyTree) -> PyTree:
        return lax.ppermute(value, self.axis_name, pairs)

    def _steady(self, loop: Loop, trip: jax.Array, state: State) -> State:
        for j in range(loop.period):
            first = loop.start + j
            row = self.row(first + trip * loop.period)
            fields = self.program.table
            here = slice(first, loop.stop, loop.period)
            number = int(fields.kind[first, 0])
            if fields.f_first[here].any():
                state = self._embed(row, state)
            state = self.tasks(number, np.array([first]), row, state)
            if fields.b_first[here].any():
                state = self._embed_backward(row, state)
            # Read before a message takes its slot; see `_step` for the barrier.
            y = None
            if fields.f_last[here].any():
                y, messages = lax.optimization_barrier(
                    (read(state.messages, row.f_out), state.messages)
                )
                state = state._replace(messages=messages)
            permutes = [
                functools.partial(self._permute, pairs)
                for pairs in self.program.permutes[first]
            ]
            state = self._exchange(row, state, permutes)
            # Weight gradients belong to their own tick: its permutes run under them.
            messages, grads = lax.optimization_barrier(
                (state.messages, state.stage_grads)
            )
            state = state._replace(messages=messages, stage_grads=grads)
            # The loss needs much memory: not before these gradients are added up.
            if y is not None:
                state = self._finish(row, state, y)
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
          number: of the kind.
          ticks: in which this is called; what no rank has in them is not compiled.
          row: of this tick.
          state: before it.
          predicate: whether this rank has such a step; None: all have.

        Returns:
          The state after it.
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
        """The ranks that have steps of a kind in these ticks, by their variants."""
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
        stages = self.work.stages
        ops = dict(kind)
        variant = {op: v for (op, _), v in zip(kind, variants, strict=True)}
        chunks, messages, residuals, queue = row_major(
            (self.chunks, state.messages, state.residuals, state.queue)
        )
        reads = {}
        if "F" in ops:
            reads["x"] = read(messages, row.f_in)
        if "B" in ops or "I" in ops:
            reads["dy"] = read(messages, row.b_in)
        for op in {"B", "I", "W"} & set(ops):
            kept = at(residuals, stages[variant[op]].residuals)
            reads["residuals"] = read(kept, row.b_slot)
        if "W" in ops:
            crossed = at(queue, stages[variant["W"]].crossing)
            reads["crossing"] = read(crossed, row.queue)
        if "W" not in ops:
            # Without this order between reads and writes of a buffer, XLA copies all
            # of it.
            reads, messages, residuals = lax.optimization_barrier(
                (reads, messages, residuals)
            )
        grads = list(state.stage_grads)
        aux = list(state.stage_aux)
        writes = []
        forward_args = backward_args = None
        if "F" in ops:
            chunk = ops["F"]
            number, microbatch = self.stages[chunk], row.f_microbatch
            forward_args = (chunks[chunk], reads["x"], number, microbatch)
        if "B" in ops:
            backward_args = (chunks[ops["B"]], reads["residuals"], reads["dy"])
        forward = backward = None
        if forward_args is not None and backward_args is not None:
            forward, backward = self.work.pair(
                (variant["F"], forward_args), (variant["B"], backward_args)
            )
        elif forward_args is not None:
            forward = stages[variant["F"]].forward(*forward_args)
        elif backward_args is not None:
            backward = stages[variant["B"]].backward(*backward_args)
        if forward is not None:
            chunk = ops["F"]
            y, new_aux, saved = forward
            aux[chunk] = self.add_aux(aux[chunk], new_aux, row.f_microbatch)
            writes.append((row.f_out, y))
            places = stages[variant["F"]].residuals
            if not self.forward_only:
                residuals = write_at(residuals, places, row.f_slot, saved)
        if backward is not None:
            chunk = ops["B"]
            new, dx = backward
            writes.append((row.b_out, dx))
            grads[chunk] = accumulate(grads[chunk], new)
        if "I" in ops:
            work = stages[variant["I"]]
            dx, crossing = work.backward_input(
                chunks[ops["I"]], reads["residuals"], reads["dy"]
            )
            writes.append((row.b_out, dx))
            queue = write_at(queue, work.crossing, row.queue, crossing)
        if "W" in ops:
            chunk = ops["W"]
            new = stages[variant["W"]].backward_weights(
                chunks[chunk], reads["residuals"], reads["crossing"]
            )
            grads[chunk] = accumulate(grads[chunk], new)
        for slot, value in writes:
            messages = write(messages, slot, value)
        messages, residuals, queue = row_major((messages, residuals, queue))
        return state._replace(
            messages=messages,
            residuals=residuals,
            queue=queue,
            stage_grads=tuple(grads),
            stage_aux=tuple(aux),
        )

    def _embed(self, row: Row, state: State) -> State:
        return state._replace(
            messages=when(
                row.f_first == 1,
                lambda messages: write(
                    messages, row.f_in, self.work.embed(row.f_microbatch)
                ),
                state.messages,
            )
        )

    def _finish(self, row: Row, state: State, y: PyTree) -> State:
        """After the last stage: the loss and its cotangent, or the model's output."""

        def body(carry):
            messages, outputs, head_grads, embed_grads, aux = carry
            output, new_aux, head, embed, dy = self.work.finish(y, row.f_microbatch)
            outputs = write(outputs, row.f_microbatch, output)
            if dy is not None:
                messages = write(messages, row.loss_out, dy)
            return (
                messages,
                outputs,
                accumulate(head_grads, head),
                embed_grads if embed is None else accumulate(embed_grads, embed),
                self.add_aux(aux, new_aux, row.f_microbatch),
            )

        messages, outputs, head_grads, embed_grads, aux = when(
            row.f_last == 1,
            body,
            (
                state.messages,
                state.outputs,
                state.head_grads,
                state.embed_grads,
                state.loss_aux,
            ),
        )
        return state._replace(
            messages=messages,
            outputs=outputs,
            head_grads=head_grads,
            embed_grads=embed_grads,
            loss_aux=aux,
        )

    def _embed_backward(self, row: Row, state: State) -> State:
        backward = self.work.embed_backward
        if backward is None:
            return state

        def body(carry):
            messages, grads = carry
            dx = read(messages, row.b_out)
            return messages, accumulate(grads, backward(dx, row.b_microbatch))

        messages, grads = when(
            row.b_first == 1, body, (state.messages, state.embed_grads)
        )
        return state._replace(messages=messages, embed_grads=grads)

    def _exchange(self, row: Row, state: State, permutes) -> State:
        """Sends and receives: reads all of a tick's messages before it writes one."""
        values = [read(state.messages, row.send[k]) for k in range(len(permutes))]
        values, messages = lax.optimization_barrier((values, state.messages))
        for k, (permute, value) in enumerate(zip(permutes, values, strict=True)):
            messages = write(messages, row.receive[k], permute(value))
        return state._replace(messages=messages)
