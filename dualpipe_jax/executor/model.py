"""A user's model on a mesh: the inputs and outputs of `jax.shard_map`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dualpipe_jax import compat
from dualpipe_jax.executor import checks as _checks
from dualpipe_jax.executor.compact import CompactRunner
from dualpipe_jax.executor.functions import Functions
from dualpipe_jax.executor.keys import check_key
from dualpipe_jax.executor.losses import mean_over_devices
from dualpipe_jax.executor.overlapped import OverlappedRunner
from dualpipe_jax.executor.params import PipelineAux, PipelineParams, trained_flags
from dualpipe_jax.executor.reductions import AuxReduction, sum_dtype, sum_over_ranks
from dualpipe_jax.executor.runner import Runner, State
from dualpipe_jax.executor.side import check_side
from dualpipe_jax.executor.specs import check_specs_fit, explicit_part, map_specs
from dualpipe_jax.executor.stage_transfer import StageParamTransfer
from dualpipe_jax.executor.trainable import Flags, check_differentiated, select
from dualpipe_jax.executor.work import forward_work, training_work
from dualpipe_jax.lowering import Program

PyTree = Any
P = PartitionSpec


class Outputs(NamedTuple):
    """The results of one call.

    Attributes:
      outputs: losses [num_microbatches]; of a forward-only program the last stage's
        outputs, leaves [num_microbatches, microbatch, ...].
      aux: auxiliary outputs, or None.
      grads: gradients of the trained parameters, in training.
      input_grads: gradients of the inputs, in training and if wanted.
    """

    outputs: PyTree
    aux: PyTree
    grads: PyTree
    input_grads: PyTree


class Prepared(NamedTuple):
    """The runner of one device and its initial state.

    Attributes:
      runner: runs the program.
      state: buffers, with gradients and sums at zero.
      transfer: moves stages between the ranks that own them and those that run them.
    """

    runner: Runner
    state: State
    transfer: StageParamTransfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The user's functions, a program, and how arrays lie on the mesh.

    The fields are the arguments of `pipeline_value_and_grad`, the schedule lowered;
    without a `loss_fn` the model runs forward only.
    """

    stage_fn: Callable[..., PyTree] | Sequence[Callable[..., PyTree]]
    embed_fn: Callable[..., PyTree] | None
    loss_fn: Callable[..., Any] | None
    program: Program
    mesh: Mesh
    axis_name: str
    data_axes: tuple[str, ...]
    param_specs: PipelineParams
    tied: bool = False
    aux_reduction: str = "sum"
    accumulate_dtype: Any = jnp.float32
    overlap: bool | None = None
    side: PyTree = None
    trainable: Any = None
    input_grads: bool = False

    @property
    def runner(self) -> type[Runner]:
        """The class that runs the program, with or without bodies for pairs."""
        overlap = self.overlap
        if overlap is None:
            # In one process every permute is a barrier over all virtual devices, so no
            # order of the tasks hides communication.
            overlap = compat.platform_of(self.mesh) != "cpu" or (
                len({device.process_index for device in self.mesh.devices.flat}) > 1
            )
        return OverlappedRunner if overlap else CompactRunner

    @functools.cached_property
    def variants(self) -> tuple[tuple[Callable[..., PyTree], ...], tuple[int, ...]]:
        """The distinct stage functions, and which of them each stage runs."""
        if callable(self.stage_fn):
            return (self.stage_fn,), (0,) * self.program.schedule.num_stages
        # Compared, not hashed: bound methods are new objects, modules may lack a hash.
        found: list[Callable[..., PyTree]] = []
        for fn in self.stage_fn:
            if fn not in found:
                found.append(fn)
        return tuple(found), tuple(found.index(fn) for fn in self.stage_fn)

    @property
    def reduction(self) -> AuxReduction:
        """How auxiliary outputs are reduced."""
        num_microbatches = self.program.schedule.num_microbatches
        return AuxReduction(self.aux_reduction, num_microbatches, self.data_axes)

    @property
    def non_pipeline_axes(self) -> tuple[str, ...]:
        """The mesh axes other than the pipeline's."""
        return tuple(a for a in self.mesh.axis_names if a != self.axis_name)

    def call(self, params, inputs, targets, key, side) -> Outputs:
        """Runs the program on the whole mesh; global arrays in and out."""
        self.check(params, inputs, targets, key, side)
        if self.loss_fn is None:
            forward = self.mapped(self._forward, self.batch_spec)
            out = forward(params, inputs, targets, key, side)
            return Outputs(out, None, None, None)
        aux = PipelineAux(P(self.axis_name), P())
        grads = self.specs_of(self.trained(params))
        train = self.mapped(self._train, Outputs(P(), aux, grads, self.batch_spec))
        out = train(params, inputs, targets, key, side)
        stages, loss = out.aux
        if stages is None or loss is None:
            out = out._replace(aux=loss if stages is None else stages)
        return out

    def check(self, params, inputs, targets, key, side) -> None:
        """Raises a ValueError for invalid arguments of `call`."""
        schedule = self.program.schedule
        _checks.check_params(params, schedule)
        check_specs_fit(self.specs_of(params), params, self.mesh)
        _checks.check_batch(inputs, targets, schedule, self.mesh, self.data_axes)
        check_side(side, self.side, schedule, self.mesh)
        check_key(key, (*self.variants[0], self.embed_fn, self.loss_fn))
        if self.loss_fn is not None:
            check_differentiated(
                self.trainable, self.trained(params), self.input_grads, inputs
            )

    def trained(self, params: PipelineParams) -> PipelineParams:
        """Returns the parameters with None for those that are not trained."""
        return params.partition(self.trainable)[0]

    @property
    def batch_spec(self) -> PartitionSpec:
        """The sharding of inputs and targets."""
        return P(None, self.data_axes) if self.data_axes else P()

    @property
    def side_specs(self) -> PyTree:
        """The sharding of side inputs, a prefix of their tree."""
        return P() if self.side is None else self.side

    def mapped(self, body: Callable, out_specs: PyTree) -> Callable:
        """Maps `body(params, inputs, targets, key, side, *rest)` of a device on a mesh.

        Everything in `rest` is replicated.
        """
        batch, beside = self.batch_spec, self.side_specs

        def call(params, inputs, targets, key, side, *rest):
            specs = self.specs_of(params)
            run = jax.shard_map(
                body,
                mesh=self.mesh,
                in_specs=(specs, batch, batch, P(), beside, *(P() for _ in rest)),
                out_specs=out_specs,
                # Every value is local to its device. Gradients of replicated values
                # are summed once, at the end, and not by AD in each tick.
                check_vma=False,
            )
            params = self._place(params, specs)
            inputs, targets = (self._place(tree, batch) for tree in (inputs, targets))
            side = self._place(side, beside)
            return run(params, inputs, targets, key, side, *rest)

        return call

    def _place(self, tree: PyTree, specs: PyTree) -> PyTree:
        """Reshards arrays to their specs over the mesh's Explicit axes."""
        if AxisType.Explicit not in self.mesh.axis_types:
            return tree

        def place(spec: PartitionSpec, part: PyTree) -> PyTree:
            sharding = NamedSharding(self.mesh, explicit_part(spec, self.mesh))
            return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, sharding), part)

        return jax.tree.map(
            place, specs, tree, is_leaf=lambda node: isinstance(node, PartitionSpec)
        )

    def specs_of(self, params: PipelineParams) -> PipelineParams:
        """Returns the specs of the parameters, one per leaf."""
        return map_specs(
            lambda spec, _: P(*spec), self.param_specs, params, axis_name=self.axis_name
        )

    def prepare(self, make_work, params, inputs, targets, key, side) -> Prepared:
        """Prepares one device; leaves of `params.stages` are [V, ...] here."""
        rank = lax.axis_index(self.axis_name)
        transfer = StageParamTransfer(self.program, self.axis_name)
        chunks = transfer.to_chunks(params.stages, rank)
        if key is not None and self.data_axes:
            key = jax.random.fold_in(key, lax.axis_index(self.data_axes))
        stage_fns, variants = self.variants
        functions = Functions(
            stage_fns,
            self.embed_fn,
            self.loss_fn,
            self.tied,
            self.program,
            self.axis_name,
            key,
            side,
            trained_flags(self.trainable, params),
            self.input_grads,
            compat.platform_of(self.mesh),
        )
        work, buffers = make_work(functions, params, chunks[0], inputs, targets)
        packed = self.runner.pack(chunks)
        num_wgrad_residual_slots = self.runner.num_wgrad_residual_slots(self.program)
        state = State(
            # One spare message slot: ranks that receive nothing write there.
            messages=_slots(buffers.activation, self.program.num_message_slots + 1),
            residuals=_slots(buffers.residuals, self.program.num_slots),
            wgrad_residuals=_slots(buffers.wgrad_residuals, num_wgrad_residual_slots),
            stage_grads=self._zero_grads(packed, functions.trained.stages),
            embed_grads=self._zero_grads(params.embed, functions.trained.embed),
            head_grads=self._zero_grads(params.head, functions.trained.head),
            input_grads=jax.tree.map(jnp.zeros_like, functions.varied(inputs)),
            outputs=_slots(buffers.output, self.program.schedule.num_microbatches),
            stage_aux=self.runner.pack(
                tuple(self.reduction.zeros(buffers.stage_aux) for _ in chunks)
            ),
            loss_aux=self.reduction.zeros(buffers.loss_aux),
        )
        runner = self.runner(
            self.program,
            work,
            variants,
            packed,
            rank,
            self.axis_name,
            self.reduction.add,
            ordered=functions.platform == "cpu",
        )
        return Prepared(runner, state, transfer)

    def _forward(self, *args) -> PyTree:
        runner, state, _ = self.prepare(forward_work, *args)
        # Only the rank of the last stage writes; the others hold zeros.
        return lax.psum(runner.run(state).outputs, self.axis_name)

    def _train(self, params, *args) -> Outputs:
        runner, state, transfer = self.prepare(training_work, params, *args)
        state, rank = runner.run(state), runner.rank
        outputs = lax.psum(state.outputs, self.axis_name)
        grads = PipelineParams(
            transfer.to_owners(runner.unpack(state.stage_grads), rank),
            sum_over_ranks(state.embed_grads, self.axis_name),
            sum_over_ranks(state.head_grads, self.axis_name),
        )
        # Only ranks of the first stage have gradients of inputs; the others hold zeros.
        input_grads = lax.psum(state.input_grads, self.axis_name)
        axes = self.non_pipeline_axes
        losses, divide = mean_over_devices(
            outputs, axes, math.prod(self.mesh.shape[axis] for axis in axes)
        )
        mean = functools.partial(self._mean_grad, divide)
        grads = jax.tree.map(mean, grads, self.specs_of(self.trained(params)))
        input_grads = jax.tree.map(
            lambda grad: mean(grad, self.batch_spec), input_grads
        )
        stage_aux = transfer.to_owners(runner.unpack(state.stage_aux), rank)
        loss_aux = sum_over_ranks(state.loss_aux, self.axis_name)
        aux = (self.reduction.finish(aux) for aux in (stage_aux, loss_aux))
        # None where a function returns nothing.
        aux = PipelineAux(*(tree if jax.tree.leaves(tree) else None for tree in aux))
        return Outputs(losses, aux, grads, input_grads)

    def _mean_grad(self, divide, grad: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Averages gradients over devices: sums copies, divides the sum."""
        if not jnp.issubdtype(grad.dtype, jnp.inexact):
            return grad
        sharded = set(jax.tree.leaves(tuple(spec)))
        copies = tuple(axis for axis in self.non_pipeline_axes if axis not in sharded)
        return divide(lax.psum(grad, copies) if copies else grad)

    def _zero_grads(self, params: PyTree, trained: Flags) -> PyTree:
        if self.loss_fn is None:
            return None
        return jax.tree.map(
            functools.partial(_zero_grad, accumulate_dtype=self.accumulate_dtype),
            select(params, trained),
        )


def _zero_grad(leaf: jax.Array, accumulate_dtype: Any) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return jnp.zeros(leaf.shape, sum_dtype(leaf.dtype, accumulate_dtype))


def _slots(tree: PyTree, count: int) -> PyTree:
    """Returns buffers of slots, in the memory of what they hold."""

    def buffer(struct: jax.ShapeDtypeStruct) -> jax.Array:
        make = compat.host_buffer if compat.is_on_host(struct) else jnp.zeros
        return make((count, *struct.shape), struct.dtype)

    return jax.tree.map(buffer, tree)
