"""What every device runs: state, tables, and the parts that both runners share.

The form of the loops follows from what XLA does with them (docs/design.md):
- a permute is never under a predicate that differs between ranks, which would deadlock;
  a switch on the tick, equal on all ranks, chooses the tick's permutes;
- work of only some ranks is guarded by a while loop of zero or one trip, whose carry is
  updated in place, where `lax.cond` would copy every buffer;
- parameters and buffers are row-major in all loops, or XLA copies them between loops.

`overlapped` and `compact` are the two runners of a tick's tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax.executor.in_place import accumulate, read, when, write
from dualpipe_jax.executor.work import Work
from dualpipe_jax.lowering import Program
from eplb_jax.runtime import zero_after

PyTree = Any


class State(NamedTuple):
    """The carry of the loops. Leaves of buffers have a leading slot axis."""

    messages: PyTree  # activations and cotangents in transit between stages
    residuals: tuple[jax.Array, ...]  # from F to W
    wgrad_residuals: tuple[jax.Array, ...]  # from I to W
    stage_grads: tuple[PyTree, ...]  # one tree per chunk
    embed_grads: PyTree
    head_grads: PyTree
    input_grads: PyTree  # [num_microbatches, ...], None where there are none
    outputs: PyTree  # [num_microbatches, ...]: losses, or outputs of the last stage
    stage_aux: tuple[PyTree, ...]  # one tree per chunk
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
    wgrad_slot: jax.Array
    loss_out: jax.Array
    send: jax.Array  # [rounds]
    receive: jax.Array  # [rounds]


class Runner:
    """Runs all ticks of a program on one device, inside `jax.shard_map`.

    Attributes:
      program: the program to run.
      work: the model's functions.
      variants: for each stage, its index in `work.stages`.
      chunks: this rank's stage parameters, as `pack` returns them.
      rank: position on the pipeline axis.
      axis_name: name of the pipeline axis.
      add_aux: adds one microbatch's auxiliary outputs to their accumulator.
      ordered: whether messages are sent only when all of a tick's tasks are done.
    """

    def __init__(
        self,
        program: Program,
        work: Work,
        variants: tuple[int, ...],
        chunks: PyTree,
        rank: jax.Array,
        axis_name: str,
        add_aux: Callable[[PyTree, PyTree, jax.Array], PyTree],
        ordered: bool,
    ):
        self.program = program
        self.work = work
        self.variants = variants
        self.chunks = chunks
        self.rank = rank
        self.axis_name = axis_name
        self.add_aux = add_aux
        self.ordered = ordered
        self.stages = jnp.asarray(np.asarray(program.chunks, np.int32))[rank]
        self.table = Row(*(jnp.asarray(field)[:, rank] for field in program.table))
        self.forward_only = program.schedule.is_forward_only

    @staticmethod
    def num_wgrad_residual_slots(program: Program) -> int:
        """Returns the number of slots for what I keeps for W."""
        return program.num_wgrad_residual_slots

    @staticmethod
    def pack(chunks: tuple[PyTree, ...]) -> PyTree:
        """Packs the parameters, gradients or aux of a rank's chunks for the tasks."""
        raise NotImplementedError

    def unpack(self, chunks: PyTree) -> tuple[PyTree, ...]:
        """The inverse of `pack`."""
        raise NotImplementedError

    def run(self, state: State) -> State:
        """Returns the state after the last tick."""
        raise NotImplementedError

    def run_costliest(self, state: State) -> State:
        """Returns the state after only the task that needs the most memory."""
        raise NotImplementedError

    def row(self, tick: jax.Array) -> Row:
        """Returns this rank's entries of a tick."""
        return read(self.table, tick)

    def permutes_in(self, ticks: np.ndarray) -> tuple[np.ndarray, Callable]:
        """Returns the permutes of some ticks, for a body that runs all of these ticks.

        Args:
          ticks: numbers of the ticks.

        Returns:
          The permutes of each tick, [len(ticks), num_rounds] int32; and a function from
          a traced row of these to one permute per round.
        """
        patterns = [
            sorted({self._pairs(int(t), k) for t in ticks} - {()})
            for k in range(self.program.num_rounds)
        ]
        choice = np.zeros((len(ticks), self.program.num_rounds), np.int32)
        for i, tick in enumerate(ticks):
            for k, known in enumerate(patterns):
                pairs = self._pairs(int(tick), k)
                choice[i, k] = 1 + known.index(pairs) if pairs else 0

        def permutes(chosen: jax.Array) -> list[Callable]:
            return [
                functools.partial(self._choose, chosen[k], known)
                for k, known in enumerate(patterns)
            ]

        return choice, permutes

    def permute(self, pairs: tuple[tuple[int, int], ...], value: PyTree) -> PyTree:
        """Sends a message along (source, target) pairs of ranks."""
        return lax.ppermute(value, self.axis_name, pairs)

    def _pairs(self, tick: int, k: int) -> tuple[tuple[int, int], ...]:
        groups = self.program.permutes[tick]
        return groups[k] if k < len(groups) else ()

    def _choose(self, choice, patterns, value: PyTree) -> PyTree:
        branches = [lambda value: value]
        branches += [functools.partial(self.permute, pairs) for pairs in patterns]
        return lax.switch(choice, branches, value)

    def embed(self, row: Row, state: State) -> State:
        return state._replace(
            messages=when(
                row.f_first == 1,
                lambda messages: write(
                    messages, row.f_in, self.work.embed(row.f_microbatch)
                ),
                state.messages,
            )
        )

    def finish(self, row: Row, state: State, y: PyTree) -> State:
        """Follows the last stage: the loss and its cotangent, or the model's output."""

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

    def embed_backward(self, row: Row, state: State) -> State:
        backward = self.work.embed_backward
        if backward is None:
            return state

        def body(carry):
            messages, grads, input_grads = carry
            new, d_inputs = backward(read(messages, row.b_out), row.b_microbatch)
            input_grads = write(input_grads, row.b_microbatch, d_inputs)
            return messages, accumulate(grads, new), input_grads

        messages, grads, input_grads = when(
            row.b_first == 1,
            body,
            (state.messages, state.embed_grads, state.input_grads),
        )
        return state._replace(
            messages=messages, embed_grads=grads, input_grads=input_grads
        )

    def exchange(self, row: Row, state: State, permutes) -> State:
        """Sends and receives a tick's messages; reads all before writing any."""
        if self.ordered:
            return state._replace(
                messages=self._exchange_in_order(row, state, permutes)
            )
        values = [read(state.messages, row.send[k]) for k in range(len(permutes))]
        values, messages = lax.optimization_barrier((values, state.messages))
        for k, (permute, value) in enumerate(zip(permutes, values, strict=True)):
            messages = write(messages, row.receive[k], permute(value))
        return state._replace(messages=messages)

    def _exchange_in_order(self, row: Row, state: State, permutes) -> PyTree:
        """The same, and each permute waits for what could run beside it.

        See `eplb_jax.runtime` for why, and docs/design.md for what happens otherwise.
        """
        zero = zero_after(_beside_messages(state))
        received = []
        for k, permute in enumerate(permutes):
            received.append(permute(read(state.messages, row.send[k] + zero)))
            zero = zero_after(received[-1])
        received, messages = lax.optimization_barrier((received, state.messages))
        for k, value in enumerate(received):
            messages = write(messages, row.receive[k], value)
        return messages


def _beside_messages(state: State) -> PyTree:
    """What guards compute that may leave the messages alone."""
    grads = jax.tree.leaves(state.stage_grads)
    ends = grads[:1], grads[-1:]  # of the first chunk and of the last
    return state.embed_grads, state.input_grads, state.outputs, ends
