"""`pipeline_value_and_grad` and `pipeline_forward`: a schedule as one jitted function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dualpipe_jax import _checks
from dualpipe_jax._exchange import Exchange
from dualpipe_jax._executor import State, Work, run
from dualpipe_jax.lowering import Program, lower
from dualpipe_jax.schedule import Schedule
from dualpipe_jax.split_backward import SplitBackward

PyTree = Any
P = PartitionSpec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("stages", "embed", "head"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class PipelineParams:
    """Parameters of a pipelined model; a pytree, so optax and orbax take it as it is.

    Attributes:
      stages: one copy of every stage; each leaf has a leading axis [num_stages, ...]
        in model order. `stack_stages` makes it from a list.
      embed: parameters of `embed_fn`, or None.
      head: parameters of `loss_fn`, or None.
    """

    stages: PyTree
    embed: PyTree = None
    head: PyTree = None


class PipelineAux(NamedTuple):
    """Auxiliary outputs where both functions return some.

    Attributes:
      stages: of `stage_fn`, with a leading axis [num_stages, ...].
      loss: of `loss_fn`.
    """

    stages: PyTree
    loss: PyTree


def stack_stages(stages: Sequence[PyTree]) -> PyTree:
    """Stacks the parameters of stages, in model order, along a new leading axis.

    Args:
      stages: one pytree a stage, all of the same structure and shapes.

    Returns:
      One pytree whose leaves are [num_stages, ...].

    Raises:
      ValueError: there is no stage, or the stages differ in structure or shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> stack_stages([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
      (2, 3)
    """
    if not stages:
        raise ValueError(f"{stages=} is empty; give one pytree a stage.")
    first = _checks.describe(stages[0])
    for i, stage in enumerate(stages):
        if _checks.describe(stage) != first:
            raise ValueError(
                f"stages[{i}] differs from stages[0] ({_checks.describe(stage)} against "
                f"{first}); stages must have the same structure, shapes and dtypes."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stages)


def microbatch_key(key: jax.Array, stage: Any, microbatch: Any) -> jax.Array:
    """The key of one stage's work on one microbatch, whatever the schedule.

    Args:
      key: the key that the step was called with.
      stage: logical stage; the embedding has `num_stages`.
      microbatch: numbered over both directions.

    Returns:
      A key that depends on nothing but the three.
    """
    return jax.random.fold_in(jax.random.fold_in(key, stage), microbatch)


def pipeline_value_and_grad(
    stage_fn: Callable[..., PyTree],
    loss_fn: Callable[..., Any],
    *,
    schedule: Schedule,
    mesh: Mesh,
    axis_name: str = "pp",
    embed_fn: Callable[..., PyTree] | None = None,
    data_axes: Sequence[str] = (),
    param_specs: PipelineParams | None = None,
    tied: bool = False,
    aux_reduction: PyTree = "sum",
    accumulate_dtype: Any = jnp.float32,
) -> Callable[..., tuple[tuple[jax.Array, PyTree], PipelineParams]]:
    """Losses and gradients of a pipelined model, as one function for `jax.jit`.

    The functions see one microbatch, and run inside `jax.shard_map` over all axes of
    the mesh: they may use collectives over every axis but `axis_name`. Over the
    axes beside it the step's loss is the mean of what the devices compute, each from
    its own part of the microbatch where `data_axes` split it.

    Args:
      stage_fn: `stage_fn(stage_params, x) -> y` or `(y, aux)`; x and y are pytrees of
        floating arrays of the same shapes and dtypes. May be `jax.checkpoint`ed.
      loss_fn: `loss_fn(head_params, y, targets) -> scalar` or `(scalar, aux)`.
      schedule: which rank does what when.
      mesh: mesh with the axis `axis_name`, of size `schedule.num_ranks`.
      axis_name: the pipeline axis.
      embed_fn: `embed_fn(embed_params, inputs) -> x`; by default x is the input.
      data_axes: mesh axes that split axis 1 of inputs and targets.
      param_specs: `PartitionSpec`s (a prefix of the parameters' tree) over axes other
        than `axis_name`, without the stage axis; by default parameters are
        replicated over them. A function sees its own shard.
      tied: `loss_fn` gets `(embed_params, head_params)` as its first argument, and
        the gradients of both uses of the embedding are summed in `grads.embed`.
      aux_reduction: `"sum"`, `"mean"` or `"stack"` over microbatches (and sum, mean or
        mean over `data_axes`), for all auxiliary outputs.
      accumulate_dtype: gradients are summed over microbatches in this dtype, or in
        the parameter's own if that is wider, and returned in it.

    Returns:
      `step(params, inputs, targets, key=None) -> (losses, aux), grads`.
      - params: `PipelineParams`; leaves of `stages` are [num_stages, ...].
      - inputs, targets: pytrees, leaves [num_microbatches, microbatch, ...].
      - key: with a key, `stage_fn` and `embed_fn` are called with `key=` of their own
        (see `microbatch_key`; folded with the position along `data_axes`).
      - losses: [num_microbatches] float32.
      - aux: what `stage_fn` (leaves [num_stages, ...]) or `loss_fn` returned beside,
        reduced; a `PipelineAux` if both do, None if none does.
      - grads: like params, of the mean of losses.

    Raises:
      ValueError: the schedule does not fit the mesh, a parameter leaf lacks the stage
        axis, a stage changes the shape of its input, activations are not floating,
        the loss is no scalar, and the like; before anything is compiled.

    References:
      DeepSeek-V3 Technical Report, section 3.2.1 (DualPipe).
    """
    _checks.check_mesh(schedule, mesh, axis_name, data_axes)
    if schedule.is_forward_only:
        raise ValueError(
            f"{schedule.kind=} has no backward tasks; use pipeline_forward, or a "
            "training schedule."
        )
    _checks.check_reduction(aux_reduction)
    model = _Model(
        stage_fn,
        embed_fn,
        loss_fn,
        tied,
        aux_reduction,
        jnp.dtype(accumulate_dtype),
        program=lower(schedule),
        mesh=mesh,
        axis_name=axis_name,
        data_axes=tuple(data_axes),
        param_specs=param_specs or PipelineParams(P(), P(), P()),
    )

    @jax.jit
    def step(params, inputs, targets, key=None):
        out = model.call(params, inputs, targets, key)
        return (out.losses, out.aux), out.grads

    return step


def pipeline_forward(
    stage_fn: Callable[..., PyTree],
    *,
    schedule: Schedule,
    mesh: Mesh,
    axis_name: str = "pp",
    embed_fn: Callable[..., PyTree] | None = None,
    data_axes: Sequence[str] = (),
    param_specs: PipelineParams | None = None,
) -> Callable[..., PyTree]:
    """The forward pass alone: no gradients, and nothing kept for them.

    Args:
      stage_fn: as in `pipeline_value_and_grad`; auxiliary outputs are dropped.
      schedule: its F tasks, in its order.
      mesh: mesh with the axis `axis_name`, of size `schedule.num_ranks`.
      axis_name: the pipeline axis.
      embed_fn: `embed_fn(embed_params, inputs) -> x`; by default x is the input.
      data_axes: mesh axes that split axis 1 of inputs and of outputs.
      param_specs: as in `pipeline_value_and_grad`.

    Returns:
      `forward(params, inputs, key=None) -> outputs`: the last stage's outputs, leaves
      [num_microbatches, microbatch, ...].

    Raises:
      ValueError: as `pipeline_value_and_grad`.
    """
    _checks.check_mesh(schedule, mesh, axis_name, data_axes)
    model = _Model(
        stage_fn,
        embed_fn,
        None,
        False,
        "sum",
        jnp.dtype(jnp.float32),
        program=lower(schedule.forward_only()),
        mesh=mesh,
        axis_name=axis_name,
        data_axes=tuple(data_axes),
        param_specs=param_specs or PipelineParams(P(), P(), P()),
    )

    @jax.jit
    def forward(params, inputs, key=None):
        return model.call(params, inputs, (), key).losses

    return forward


class _Outputs(NamedTuple):
    losses: PyTree
    aux: PyTree
    grads: PipelineParams


@dataclasses.dataclass(frozen=True)
class _Model:
    """The user's functions, a program, and how arrays lie on the mesh."""

    stage_fn: Callable[..., PyTree]
    embed_fn: Callable[..., PyTree] | None
    loss_fn: Callable[..., Any] | None
    tied: bool
    aux_reduction: str
    accumulate_dtype: Any
    program: Program
    mesh: Mesh
    axis_name: str
    data_axes: tuple[str, ...]
    param_specs: PipelineParams

    @property
    def schedule(self) -> Schedule:
        return self.program.schedule

    def call(self, params, inputs, targets, key) -> _Outputs:
        _checks.check_params(params, self.schedule)
        _checks.check_batch(inputs, targets, self.schedule, self.mesh, self.data_axes)
        specs = self._param_specs(params)
        batch = P(None, self.data_axes) if self.data_axes else P()
        # Losses and aux leave with no axis but, for those of stages, the first.
        stage_aux = P(self.axis_name)
        outputs = batch if self.loss_fn is None else P()
        aux = PipelineAux(stage_aux, P())
        body = jax.shard_map(
            self._body,
            mesh=self.mesh,
            in_specs=(specs, batch, batch, P()),
            out_specs=_Outputs(outputs, aux, specs if self.loss_fn else P()),
            # Every value here is one device's own. The gradients of what is
            # replicated are summed once, at the end, and not by AD in each step.
            check_vma=False,
        )
        out = body(params, inputs, targets, key)
        stages, loss = out.aux
        if stages is None or loss is None:
            return out._replace(aux=loss if stages is None else stages)
        return out

    def _param_specs(self, params: PipelineParams) -> PipelineParams:
        def full(prefix, tree, *leading):
            return jax.tree.map(
                lambda spec, part: jax.tree.map(lambda _: P(*leading, *spec), part),
                prefix,
                tree,
                is_leaf=lambda node: isinstance(node, PartitionSpec),
            )

        own = self.param_specs
        return PipelineParams(
            full(own.stages, params.stages, self.axis_name),
            full(own.embed or P(), params.embed),
            full(own.head or P(), params.head),
        )

    def _body(self, params, inputs, targets, key) -> _Outputs:
        """What one device does; leaves of `params.stages` are [V, ...] here."""
        schedule = self.schedule
        rank = lax.axis_index(self.axis_name)
        exchange = Exchange(self.program, self.axis_name)
        chunks = exchange.to_chunks(params.stages, rank)
        if key is not None and self.data_axes:
            key = jax.random.fold_in(key, lax.axis_index(self.data_axes))
        work, state = self._prepare(params, chunks[0], inputs, targets, key)
        state = run(
            self.program, work, chunks, state, rank, self.axis_name, self._add_aux
        )
        losses = lax.psum(state.losses, self.axis_name)
        if self.loss_fn is None:
            return _Outputs(losses, PipelineAux(None, None), PipelineParams(None))
        beside = tuple(a for a in self.mesh.axis_names if a != self.axis_name)
        stage_aux, loss_aux = state.stage_aux, state.loss_aux
        aux = PipelineAux(
            exchange.to_owners(stage_aux, rank) if stage_aux[0] is not None else None,
            lax.psum(loss_aux, self.axis_name),
        )
        if self.data_axes:
            reduce = lax.psum if self.aux_reduction == "sum" else lax.pmean
            aux = jax.tree.map(lambda leaf: reduce(leaf, self.data_axes), aux)
        if self.aux_reduction == "mean":
            aux = jax.tree.map(lambda a: a / schedule.num_microbatches, aux)
        grads = PipelineParams(
            exchange.to_owners(state.stage_grads, rank),
            lax.psum(state.embed_grads, self.axis_name),
            lax.psum(state.head_grads, self.axis_name),
        )
        if beside:
            losses = lax.pmean(losses, beside)
            grads = jax.tree.map(
                functools.partial(self._mean_over, beside),
                grads,
                self._param_specs(params),
            )
        return _Outputs(losses, aux, grads)

    def _mean_over(self, beside, grad, spec):
        """The step's loss is the mean over devices: sum copies, divide by devices."""
        if not jnp.issubdtype(grad.dtype, jnp.inexact):
            return grad
        sharded = set(jax.tree.leaves(tuple(spec)))
        copies = tuple(axis for axis in beside if axis not in sharded)
        total = lax.psum(grad, copies) if copies else grad
        devices = 1
        for axis in beside:
            devices *= self.mesh.shape[axis]
        return total / devices

    def _prepare(self, params, chunk, inputs, targets, key) -> tuple[Work, State]:
        """Traces the user's functions for one microbatch, and allocates the buffers."""
        schedule = self.schedule
        keyed = key is not None
        inputs_of = functools.partial(_microbatch, inputs)
        targets_of = functools.partial(_microbatch, targets)

        def key_of(stage, microbatch):
            return microbatch_key(key, stage, microbatch) if keyed else None

        def embed(embed_params, microbatch):
            if self.embed_fn is None:
                return inputs_of(microbatch)
            kwargs = {"key": key_of(schedule.num_stages, microbatch)} if keyed else {}
            return self.embed_fn(embed_params, inputs_of(microbatch), **kwargs)

        index = jax.ShapeDtypeStruct((), jnp.int32)
        x = jax.eval_shape(embed, params.embed, index)
        _checks.check_activations(x, self.embed_fn)
        stage_fn, has_aux, aux = _checks.check_stage(
            self.stage_fn, chunk, x, (key,) if keyed else ()
        )

        def staged(p, x, k):
            out = stage_fn(p, x, key=k) if keyed else stage_fn(p, x)
            return out if has_aux else (out, None)

        if self.loss_fn is None:

            def forward(p, x, stage, microbatch):
                y, _ = staged(p, x, key_of(stage, microbatch))
                return y, None, ()

            def finish(y, microbatch):
                return y, None, None, None, None

            work = Work(
                functools.partial(embed, params.embed),
                forward,
                _never,
                _never,
                _never,
                finish,
                None,
            )
            outputs = _slots(x, schedule.num_microbatches)
            none = (None,) * len(self.program.chunks[0])
            state = self._state(x, (), (), none, None, None, outputs, none, None)
            return work, state

        one_key = jax.eval_shape(key_of, index, index) if keyed else None
        plan = SplitBackward.trace(staged, chunk, x, one_key, has_aux=True)
        loss = _Loss(self.loss_fn, self.tied, schedule.num_microbatches)
        loss_aux = loss.check(params, x, jax.eval_shape(targets_of, index))

        def forward(p, x, stage, microbatch):
            (y, aux), residuals = plan.forward(p, x, key_of(stage, microbatch))
            return y, aux, residuals

        def backward(p, residuals, dy):
            grads, cotangents = plan.backward(p, residuals, dy)
            return grads, cotangents[0]

        def backward_input(p, residuals, dy):
            cotangents, crossing = plan.backward_input(p, residuals, dy)
            return cotangents[0], crossing

        def finish(y, microbatch):
            return loss(params, y, targets_of(microbatch))

        def embed_backward(dx, microbatch):
            _, pullback = jax.vjp(lambda p: embed(p, microbatch), params.embed)
            return pullback(dx)[0]

        work = Work(
            functools.partial(embed, params.embed),
            forward,
            backward,
            backward_input,
            plan.backward_weights,
            finish,
            embed_backward if jax.tree.leaves(params.embed) else None,
        )
        zeros = functools.partial(jax.tree.map, self._zero_grad)
        num_chunks = len(self.program.chunks[0])
        state = self._state(
            x,
            plan.residuals,
            plan.crossing,
            tuple(zeros(chunk) for _ in range(num_chunks)),
            zeros(params.embed),
            zeros(params.head),
            jnp.zeros(schedule.num_microbatches, jnp.float32),
            tuple(self._zero_aux(aux) for _ in range(num_chunks)),
            self._zero_aux(loss_aux),
        )
        return work, state

    def _state(self, x, residuals, crossing, *rest) -> State:
        program = self.program
        # One message slot more: ranks that receive nothing write there.
        return State(
            _slots(x, program.num_message_slots + 1),
            _slots(residuals, program.num_slots),
            _slots(crossing, program.num_weight_slots),
            *rest,
        )

    def _zero_grad(self, leaf) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros_like(leaf)
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(leaf.dtype, self.accumulate_dtype)
        return jnp.zeros(leaf.shape, dtype)

    def _zero_aux(self, aux) -> PyTree:
        lead = self.schedule.num_microbatches if self.aux_reduction == "stack" else None
        return jax.tree.map(
            lambda a: jnp.zeros(
                (a.shape if lead is None else (lead, *a.shape)), a.dtype
            ),
            aux,
        )

    def _add_aux(self, total, new, microbatch) -> PyTree:
        if self.aux_reduction == "stack":
            return jax.tree.map(
                lambda t, n: lax.dynamic_update_index_in_dim(t, n, microbatch, 0),
                total,
                new,
            )
        return jax.tree.map(jnp.add, total, new)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """`loss_fn` with its gradients, for the mean over microbatches."""

    loss_fn: Callable[..., Any]
    tied: bool
    num_microbatches: int

    def check(self, params, y, targets) -> PyTree:
        """Checks the loss's shape; returns the shapes of its auxiliary outputs."""
        first = (params.embed, params.head) if self.tied else params.head
        out = jax.eval_shape(self.loss_fn, first, y, targets)
        return _checks.check_loss(out)

    def __call__(self, params, y, targets):
        def scalar(outer, y):
            embed, head = outer
            out = self.loss_fn((embed, head) if self.tied else head, y, targets)
            return out if isinstance(out, tuple) else (out, None)

        outer = (params.embed if self.tied else None, params.head)
        loss, pullback, aux = jax.vjp(scalar, outer, y, has_aux=True)
        (embed, head), dy = pullback(jnp.asarray(1 / self.num_microbatches, loss.dtype))
        return loss.astype(jnp.float32), aux, head, embed if self.tied else None, dy


def _microbatch(tree: PyTree, microbatch: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, microbatch, keepdims=False), tree
    )


def _slots(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), tree)


def _never(*args):
    raise NotImplementedError("A forward-only program has no backward task.")
