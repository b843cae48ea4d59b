"""The jitted programs of a server: prefill, decode, rebalance and move."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualpipe_jax import compat
from dualpipe_jax.deepseek.serve.arrays import (
    PARAM_SPECS,
    Prompts,
    ServeParams,
    ServeState,
)
from dualpipe_jax.deepseek.serve.config import ServeConfig
from dualpipe_jax.deepseek.serve.mesh import make_serve_mesh
from dualpipe_jax.deepseek.serve.steps import Steps
from dualpipe_jax.deepseek.serve.weights import initial_params
from dualpipe_jax.gpu import gpu_of_device_kind
from dualpipe_jax.gpu.overlap import compile_for
from dualpipe_jax.train import CompileProgress, Job, compile_together
from eplb_jax.products import check_has_float8

P = PartitionSpec
PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class ServePrograms:
    """The jitted programs of a server.

    `decode` and `prefill` reuse the state's buffers for their result, `rebalance` those
    of both of its arguments, `move` those of the experts.

    Attributes:
      config: of the server.
      mesh: with the axis `ep`.
      abstract_params: shapes and shardings of the weights.
      abstract_state: the same of the state.
      abstract_prompts: the same of the prompts that `prefill` takes.
      abstract_idle: the same of `is_idle`, which `decode` takes.
      init: placement [MoE layers, physical experts] -> `ServeState` without requests.
      prefill: (params, state, prompts of both microbatches) -> (state, `Chosen` [2, B]
        that follow the prompts which end there).
      decode: (params, state, is_idle [2, B]) -> (state, `Chosen` [2, B]).
      rebalance: (experts, balancer state) -> (experts, balancer state).
      move: (experts, their tables, new tables) -> experts.
    """

    config: ServeConfig
    mesh: Mesh
    abstract_params: ServeParams
    abstract_state: ServeState
    abstract_prompts: tuple[Prompts, Prompts]
    abstract_idle: jax.ShapeDtypeStruct
    init: Any
    prefill: Any
    decode: Any
    rebalance: Any
    move: Any

    def compile(self, progress: CompileProgress | None = None) -> ServePrograms:
        """Returns compiled programs; no step compiles anything after that.

        `move`, which no step runs, compiles when it is first called.

        Args:
          progress: where to show what compiles.
        """
        names = ("prefill", "decode", "rebalance")
        on_cpu = compat.platform_of(self.mesh) == "cpu"

        def compile_one(name: str, lowered: Any) -> Any:
            if name == "rebalance" and on_cpu:
                # It runs rarely, and optimizing its code takes 4 s of 9.
                return lowered.compile({"xla_backend_optimization_level": 0})
            return compile_for(lowered, self.mesh)

        jobs = [
            Job(
                name,
                functools.partial(self.lower, name),
                functools.partial(compile_one, name),
            )
            for name in names
        ]
        compiled = compile_together(jobs, progress, mesh=self.mesh)
        return dataclasses.replace(self, **dict(zip(names, compiled, strict=True)))

    @property
    def compiled(self) -> tuple[jax.stages.Compiled, ...]:
        """The programs that run repeatedly, if they are compiled."""
        steps = (self.prefill, self.decode, self.rebalance)
        return tuple(step for step in steps if isinstance(step, jax.stages.Compiled))

    def lower(self, name: str | None = None) -> Any:
        """Lowers a program, given by its name; None: the step of `config.phase`."""
        name = name or self.config.phase
        params, state = self.abstract_params, self.abstract_state
        arguments = {
            "prefill": (params, state, self.abstract_prompts),
            "decode": (params, state, self.abstract_idle),
            "rebalance": (params.experts, state.balancer),
        }
        return getattr(self, name).lower(*arguments[name])


def make_serve_programs(config: ServeConfig, mesh: Mesh | None = None) -> ServePrograms:
    """Builds the programs of a server; nothing is compiled yet.

    Args:
      config: the server.
      mesh: with the axis `ep`; by default the first devices that jax has. Use that of
        `gpu_mesh` to compile for GPUs.

    Raises:
      ValueError: the mesh has another size, there are too few devices, or products are
        in float8 and the GPUs have none.
    """
    if mesh is None:
        mesh = make_serve_mesh(config)
    elif dict(mesh.shape) != config.mesh_shape:
        raise ValueError(
            f"mesh has the axes {dict(mesh.shape)}, but the server's is "
            f"{config.mesh_shape}; make it with this one."
        )
    if config.products == "fp8":
        check_has_float8(mesh.devices.flat[0])
    gpu = gpu_of_device_kind(mesh.devices.flat[0].device_kind)
    steps = Steps(config, compat.platform_of(mesh), gpu)
    whole, over, halves = P(), P("ep"), P(None, "ep")
    state_specs = ServeState(
        tokens=halves,
        positions=halves,
        sampling=halves,
        caches=over,
        balancer=whole,
        overflow=whole,
        num_fetched=whole,
    )

    def mapped(function, in_specs: Any, out_specs: Any, **options: Any) -> Any:
        run = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(run, **options)

    shape = config.placement_in_order.shape
    abstract_state = _abstract(
        lambda: steps.init(jnp.zeros(shape, jnp.int32)), state_specs, mesh
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return ServePrograms(
        config=config,
        mesh=mesh,
        abstract_params=_abstract(lambda: initial_params(config), PARAM_SPECS, mesh),
        abstract_state=abstract_state,
        abstract_prompts=_abstract(steps.no_prompts, (over, over), mesh),
        abstract_idle=_abstract(steps.all_idle, halves, mesh),
        init=jax.jit(steps.init, out_shardings=shardings),
        prefill=mapped(
            steps.prefill,
            (PARAM_SPECS, state_specs, over),
            (state_specs, halves),
            donate_argnums=1,
        ),
        decode=mapped(
            steps.decode,
            (PARAM_SPECS, state_specs, halves),
            (state_specs, halves),
            donate_argnums=1,
        ),
        rebalance=mapped(
            steps.rebalance, (over, whole), (over, whole), donate_argnums=(0, 1)
        ),
        move=mapped(steps.move, (over, whole, whole), over, donate_argnums=0),
    )


def lower_step(config: ServeConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the step that `config.phase` names for the devices of a mesh."""
    return make_serve_programs(config, mesh).lower()


def _abstract(make: Callable[[], PyTree], specs: PyTree, mesh: Mesh) -> Any:
    """Returns shapes and shardings of what `make` returns; `specs` is a prefix."""
    return jax.tree.map(
        lambda spec, tree: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
            ),
            tree,
        ),
        specs,
        jax.eval_shape(make),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
