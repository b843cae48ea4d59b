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
from jax.experimental.layout import Layout, with_layout_constraint

from dualpipe_jax._ticks import Kind, Loop
from dualpipe_jax.lowering import Program

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


def _never(*args):
    raise NotImplementedError("A forward-only program has no backward task.")


class Work(NamedTuple):
    """What the ticks call; the executor knows no model beyond these functions.

    Each gets and gives values of one microbatch; `stage` is a traced scalar.
    """

    embed: Callable[[jax.Array], PyTree]  # microbatch -> x
    forward: Callable[..., tuple]  # params, x, stage, microbatch -> y, aux, residuals
    finish: Callable[..., tuple]  # y, microbatch -> output, aux, head & embed grads, dy
    # What a forward-only program lacks:
    backward: Callable[..., tuple] = _never  # params, residuals, dy -> grads, dx
    backward_input: Callable[..., tuple] = _never  # the same -> dx, crossing
    backward_weights: Callable[..., PyTree] = _never  # .., crossing -> grads
    # Both argument tuples -> results of `forward`, results of `backward`.
    pair: Callable[..., tuple] = _never
    embed_backward: Callable[..., PyTree] | None = None  # dx, microbatch -> grads


class Runner:
    """Runs all ticks of a program on one device, inside `jax.shard_map`.

    Attributes:
      program: what to run.
      work: the functions of the model.
      chunks: this rank's stage parameters, one tree a chunk.
      rank: position on the pipeline axis.
      axis_name: name of the pipeline axis.
      add_aux: adds one microbatch's auxiliary outputs to their accumulator.
    """

    def __init__(
        self,
        program: Program,
        work: Work,
        chunks: tuple[PyTree, ...],
        rank: jax.Array,
        axis_name: str,
        add_aux: Callable[[PyTree, PyTree, jax.Array], PyTree],
    ):
        self.program = program
        self.work = work
        self.chunks = chunks
        self.rank = rank
        self.axis_name = axis_name
        self.add_aux = add_aux
        self.stages = jnp.asarray(np.asarray(program.chunks, np.int32))[rank]
        self.table = Row(*(jnp.asarray(field)[:, rank] for field in program.table))
        self.forward_only = program.schedule.is_forward_only
        steady = np.zeros(program.num_ticks, bool)
        for loop in program.loops:
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
        trips = np.zeros((len(self.program.loops), len(self.general)), np.int32)
        for number, loop in enumerate(self.program.loops):
            before = np.searchsorted(self.general, loop.start) - 1
            trips[number, before] = loop.trips
        choice = np.zeros((len(self.general), self.program.num_rounds), np.int32)
        for i, tick in enumerate(self.general):
            for k, patterns in enumerate(self.patterns):
                pairs = self._pairs(int(tick), k)
                choice[i, k] = 1 + patterns.index(pairs) if pairs else 0

        def body(i, state):
            state = self._general_tick(state, ticks[i], jnp.asarray(choice)[i])
            for number, loop in enumerate(self.program.loops):
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
        for number, kind in enumerate(self.program.kinds):
            if not (self.program.table.kind[self.general] == number).any():
                continue
            state = _when(
                row.kind == number,
                lambda state, kind=kind: self.step(kind, row, state),
                state,
            )
        state = self._finish(row, state, _read(state.messages, row.f_out))
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
            kind = self.program.kinds[int(fields.kind[first, 0])]
            if fields.f_first[here].any():
                state = self._embed(row, state)
            state = self.step(kind, row, state)
            if fields.b_first[here].any():
                state = self._embed_backward(row, state)
            # Read before a message takes its slot; see `step` for the barrier.
            y = None
            if fields.f_last[here].any():
                y, messages = lax.optimization_barrier(
                    (_read(state.messages, row.f_out), state.messages)
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

    def step(self, kind: Kind, row: Row, state: State) -> State:
        """Runs one task, or the two of an overlapped pair side by side."""
        ops = dict(kind)
        chunks, messages, residuals, queue = _row_major(
            (self.chunks, state.messages, state.residuals, state.queue)
        )
        reads = {}
        if "F" in ops:
            reads["x"] = _read(messages, row.f_in)
        if "B" in ops or "I" in ops:
            reads["dy"] = _read(messages, row.b_in)
        if {"B", "I", "W"} & set(ops):
            reads["residuals"] = _read(residuals, row.b_slot)
        if "W" in ops:
            reads["crossing"] = _read(queue, row.queue)
        if "W" not in ops:
            # Without this order between reads and writes of a buffer, XLA copies all
            # of it.
            reads, messages, residuals = lax.optimization_barrier(
                (reads, messages, residuals)
            )
        grads = list(state.stage_grads)
        aux = list(state.stage_aux)
        writes = []
        forward = backward = None
        if "F" in ops:
            chunk = ops["F"]
            forward = (
                chunks[chunk],
                reads["x"],
                self.stages[chunk],
                row.f_microbatch,
            )
        if "B" in ops:
            backward = (chunks[ops["B"]], reads["residuals"], reads["dy"])
        forward, backward = self._run_both(forward, backward)
        if forward is not None:
            chunk = ops["F"]
            y, new_aux, saved = forward
            aux[chunk] = self.add_aux(aux[chunk], new_aux, row.f_microbatch)
            writes.append((row.f_out, y))
            if not self.forward_only:
                residuals = _write(residuals, row.f_slot, saved)
        if backward is not None:
            chunk = ops["B"]
            new, dx = backward
            writes.append((row.b_out, dx))
            grads[chunk] = _accumulate(grads[chunk], new)
        if "I" in ops:
            dx, crossing = self.work.backward_input(
                chunks[ops["I"]], reads["residuals"], reads["dy"]
            )
            writes.append((row.b_out, dx))
            queue = _write(queue, row.queue, crossing)
        if "W" in ops:
            chunk = ops["W"]
            new = self.work.backward_weights(
                chunks[chunk], reads["residuals"], reads["crossing"]
            )
            grads[chunk] = _accumulate(grads[chunk], new)
        for slot, value in writes:
            messages = _write(messages, slot, value)
        messages, residuals, queue = _row_major((messages, residuals, queue))
        return state._replace(
            messages=messages,
            residuals=residuals,
            queue=queue,
            stage_grads=tuple(grads),
            stage_aux=tuple(aux),
        )

    def _run_both(self, forward: tuple | None, backward: tuple | None) -> tuple:
        """Runs F, B, both or neither, from their arguments to their results."""
        if forward is not None and backward is not None:
            return self.work.pair(forward, backward)
        if forward is not None:
            return self.work.forward(*forward), None
        if backward is not None:
            return None, self.work.backward(*backward)
        return None, None

    def _embed(self, row: Row, state: State) -> State:
        return state._replace(
            messages=_when(
                row.f_first == 1,
                lambda messages: _write(
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
            outputs = _write(outputs, row.f_microbatch, output)
            if dy is not None:
                messages = _write(messages, row.loss_out, dy)
            return (
                messages,
                outputs,
                _accumulate(head_grads, head),
                embed_grads if embed is None else _accumulate(embed_grads, embed),
                self.add_aux(aux, new_aux, row.f_microbatch),
            )

        messages, outputs, head_grads, embed_grads, aux = _when(
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
            dx = _read(messages, row.b_out)
            return messages, _accumulate(grads, backward(dx, row.b_microbatch))

        messages, grads = _when(
            row.b_first == 1, body, (state.messages, state.embed_grads)
        )
        return state._replace(messages=messages, embed_grads=grads)

    def _exchange(self, row: Row, state: State, permutes) -> State:
        """Sends and receives: reads all of a tick's messages before it writes one."""
        values = [_read(state.messages, row.send[k]) for k in range(len(permutes))]
        values, messages = lax.optimization_barrier((values, state.messages))
        for k, (permute, value) in enumerate(zip(permutes, values, strict=True)):
            messages = _write(messages, row.receive[k], permute(value))
        return state._replace(messages=messages)


def _row_major(tree: PyTree) -> PyTree:
    """The same, in the layout that all loops share.

    XLA chooses layouts for each loop that a value passes through, as the products in it
    would like it best. It copies whole buffers from one layout to the other, and holds
    a transposed copy of the parameters for each, all step long.
    """

    def lay(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return with_layout_constraint(leaf, Layout(tuple(range(leaf.ndim))))

    return jax.tree.map(lay, tree)


def _when(predicate: jax.Array, body: Callable[[PyTree], PyTree], carry: PyTree):
    """`body(carry)` where the predicate holds, in place; see the module's docstring.

    The carry holds all buffers that `body` reads or writes. The barrier keeps what
    follows after those reads: XLA forgets the order of a buffer that passes through
    a loop unchanged, and would copy it before the next write.
    """
    _, carry = lax.while_loop(
        lambda c: c[0],
        lambda c: (jnp.zeros_like(c[0]), body(c[1])),
        (predicate, carry),
    )
    return lax.optimization_barrier(carry)


def _read(tree: PyTree, slot: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, slot, keepdims=False), tree
    )


def _write(tree: PyTree, slot: jax.Array, value: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, slot, axis=0),
        tree,
        value,
    )


def _accumulate(total: PyTree, new: PyTree) -> PyTree:
    def add(t, n):
        # Integer parameters have no gradient; AD says so with float0.
        return t if n.dtype == jax.dtypes.float0 else t + n.astype(t.dtype)

    return jax.tree.map(add, total, new)
