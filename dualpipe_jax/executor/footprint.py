"""The buffers of a step on one device, and its costliest task compiled alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dualpipe_jax import compat
from dualpipe_jax.executor.model import Model
from dualpipe_jax.executor.work import training_work

PyTree = Any
P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class BufferBytes:
    """Bytes on one device that a step keeps from its first tick to its last.

    What a remat policy offloads to the host's memory is not among them.

    Attributes:
      residuals: activation slots: what F keeps for B, or for I and W.
      num_slots: number of activation slots; P+1 under DualPipe.
      wgrad_residuals: what I keeps for W besides the residuals.
      num_wgrad_residual_slots: number of slots for these.
      messages: activations and cotangents in transit between stages.
      gradients: accumulators of all stages that the rank runs, of embedding and head,
        and the gradients of inputs if there are any.
      parameters: parameters of these stages, embedding and head, as used in compute.
      outputs: losses and auxiliary outputs.

    Examples:
      >>> BufferBytes(40, 5, 9, 3, 2, 8, 4, 1).total
      64
    """

    residuals: int
    num_slots: int
    wgrad_residuals: int
    num_wgrad_residual_slots: int
    messages: int
    gradients: int
    parameters: int
    outputs: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(vars(self).values()) - self.num_slots - self.num_wgrad_residual_slots


def buffers_of(model: Model, *args) -> BufferBytes:
    """Returns the bytes of a training model's buffers; arguments as `Model.call`'s."""
    held, on_host = _shapes(model, *args)
    state, chunks = jax.tree.map(lambda x, away: None if away else x, held, on_host)
    return BufferBytes(
        residuals=num_bytes(state.residuals),
        num_slots=model.program.num_slots,
        wgrad_residuals=num_bytes(state.wgrad_residuals),
        num_wgrad_residual_slots=model.runner.num_wgrad_residual_slots(model.program),
        messages=num_bytes(state.messages),
        gradients=num_bytes(
            (
                state.stage_grads,
                state.embed_grads,
                state.head_grads,
                state.input_grads,
            )
        ),
        parameters=num_bytes(chunks),
        outputs=num_bytes((state.outputs, state.stage_aux, state.loss_aux)),
    )


def lower_costliest_task(model: Model, params, inputs, targets, key, side) -> Any:
    """Lowers the costliest task of a training model alone, to a `jax.stages.Lowered`.

    It takes the buffers and returns them in place, so that the temporaries of the
    compiled task are its working set.
    """

    def body(params, inputs, targets, key, side, state, chunks):
        ready = model.prepare(training_work, params, inputs, targets, key, side)
        runner = ready.runner
        runner.chunks = chunks[0]
        # Shardings of compile-only devices know no host: arguments are on the devices.
        on_host = jax.tree.map(compat.is_on_host, ready.state)
        state = jax.tree.map(lambda x, to_host: compat.move(x, to_host), state, on_host)
        state = runner.run_costliest(state)
        return jax.tree.map(lambda x: compat.move(x, False), state)

    def placed(tree: PyTree, specs: PyTree) -> PyTree:
        def place(spec: PartitionSpec, part: PyTree) -> PyTree:
            sharding = NamedSharding(model.mesh, spec)
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                part,
            )

        return jax.tree.map(place, specs, tree, is_leaf=lambda s: isinstance(s, P))

    held, _ = _shapes(model, params, inputs, targets, key, side)
    held = placed(held, P())
    params = placed(params, model.specs_of(params))
    inputs, targets = (placed(tree, model.batch_spec) for tree in (inputs, targets))
    side = placed(side, model.side_specs)
    run = jax.jit(model.mapped(body, P()), donate_argnums=5)
    return run.lower(params, inputs, targets, key, side, *held)


def num_bytes(tree: PyTree) -> int:
    """Returns the bytes of a tree's arrays, or of arrays of its shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shapes(model: Model, *args) -> tuple[PyTree, PyTree]:
    """Returns the shapes of what one device holds, and what of it is on the host.

    That is its state, and its parameters in compute.
    """
    model.check(*args)
    found = []

    def body(params, *args):
        ready = model.prepare(training_work, params, *args)
        held = ready.state, (ready.runner.chunks, params.embed, params.head)
        found.append(jax.tree.map(compat.is_on_host, held))
        return held

    # A replicated output has the same shape globally as on this device.
    run = model.mapped(body, P())
    return jax.eval_shape(run, *args), found[0]
