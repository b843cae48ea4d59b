"""The jitted programs of a server: prefill, decode and rebalance.

Shape suffixes: see `dualpipe_jax.deepseek.serve.forward`; in programs' arguments, axes
of tokens, rows and requests go over all devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualpipe_jax import compat
from dualpipe_jax.backward import run_interleaved
from dualpipe_jax.deepseek.serve.config import ServeConfig
from dualpipe_jax.deepseek.serve.forward import (
    NOWHERE,
    PARAM_SPECS,
    Forward,
    Loads,
    Prompts,
    Requests,
    Sampling,
    ServeParams,
)
from dualpipe_jax.deepseek.serve.mesh import make_serve_mesh
from dualpipe_jax.deepseek.serve.weights import initial_params
from dualpipe_jax.gpu.overlap import compile_for
from eplb_jax import BalancerState, ExpertBalancer, ExpertTables, migrate

P = PartitionSpec
PyTree = Any
HALVES = 2


class ServeState(NamedTuple):
    """What a server keeps between steps, but its weights.

    Attributes:
      tokens: [2, B] int32, the last one of each request, by halves.
      positions: [2, B] int32, theirs.
      sampling: of the requests, [2, B].
      caches: for each half, for each layer, latents [B, positions, W].
      balancer: of all MoE layers.
      overflow: [] int32, choices of experts so far that found no room.
    """

    tokens: Any
    positions: Any
    sampling: Any
    caches: Any
    balancer: Any
    overflow: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ServePrograms:
    """The jitted programs of a server.

    `decode` and `prefill` take the state's buffers for their result, `rebalance` those
    of both of its arguments.

    Attributes:
      config: of the server.
      mesh: with the axis `ep`.
      abstract_params: shapes and shardings of the weights.
      abstract_state: the same of the state.
      abstract_prompts: the same of what `prefill` takes.
      abstract_idle: the same of what `decode` takes beside the state.
      init: () -> `ServeState`, empty.
      prefill: (params, state, prompts of both microbatches) -> (state, tokens [2, R]
        that follow on the prompts that end there).
      decode: (params, state, is_idle [2, B]) -> (state, tokens [2, B]).
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

    def compile(self) -> ServePrograms:
        """The same, compiled ahead of the first step; nothing compiles after that."""
        names = ("prefill", "decode", "rebalance", "move")
        lowered = {name: self.lower(name) for name in names}
        with futures.ThreadPoolExecutor() as pool:
            running = {
                name: pool.submit(compile_for, each, self.mesh)
                for name, each in lowered.items()
            }
            return dataclasses.replace(
                self, **{name: each.result() for name, each in running.items()}
            )

    @property
    def compiled(self) -> tuple[jax.stages.Compiled, ...]:
        """Those that run again and again, as XLA has compiled them."""
        steps = (self.prefill, self.decode, self.rebalance)
        return tuple(step for step in steps if isinstance(step, jax.stages.Compiled))

    def lower(self, name: str | None = None) -> Any:
        """A program, lowered: by its name, or the step that `config.phase` names."""
        name = name or self.config.phase
        params, state = self.abstract_params, self.abstract_state
        tables = state.balancer.tables
        arguments = {
            "prefill": (params, state, self.abstract_prompts),
            "decode": (params, state, self.abstract_idle),
            "rebalance": (params.experts, state.balancer),
            "move": (params.experts, tables, tables),
        }
        return getattr(self, name).lower(*arguments[name])


def make_serve_programs(config: ServeConfig, mesh: Mesh | None = None) -> ServePrograms:
    """Builds the programs of a server; nothing is compiled yet.

    Args:
      config: the server.
      mesh: with the axis `ep`; by default the first devices that jax has. That of
        `gpu_mesh` serves to compile for GPUs.

    Raises:
      ValueError: the mesh has another size, or there are too few devices.
    """
    if mesh is None:
        mesh = make_serve_mesh(config)
    elif dict(mesh.shape) != {"ep": config.num_devices}:
        raise ValueError(
            f"mesh has the axes {dict(mesh.shape)}, but the server's is "
            f"{{'ep': {config.num_devices}}}; make it with this one."
        )
    steps = _Steps(config, compat.platform_of(mesh))
    whole, over, halves = P(), P("ep"), P(None, "ep")
    state_specs = ServeState(
        tokens=halves,
        positions=halves,
        sampling=halves,
        caches=over,
        balancer=whole,
        overflow=whole,
    )

    def mapped(function, in_specs: Any, out_specs: Any, **options: Any) -> Any:
        run = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(run, **options)

    def on_mesh(make: Callable[[], PyTree], specs: PyTree) -> PyTree:
        shape = jax.eval_shape(make)
        return jax.tree.map(
            lambda spec, tree: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
                ),
                tree,
            ),
            specs,
            shape,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )

    abstract_state = on_mesh(steps.init, state_specs)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return ServePrograms(
        config=config,
        mesh=mesh,
        abstract_params=on_mesh(lambda: initial_params(config), PARAM_SPECS),
        abstract_state=abstract_state,
        abstract_prompts=on_mesh(steps.no_prompts, (over, over)),
        abstract_idle=on_mesh(steps.no_requests, halves),
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
    """The step that `config.phase` names, lowered for the devices of a mesh."""
    return make_serve_programs(config, mesh).lower()


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What the programs run on a device, and values of the shapes of all of them.

    Attributes:
      config: of the server.
      platform: of the mesh.
    """

    config: ServeConfig
    platform: str | None

    @property
    def balancer(self) -> ExpertBalancer:
        return self.config.balancer

    def _forward(self, num_tokens: int) -> Forward:
        return Forward(self.config, num_tokens, is_on_gpu=self.platform != "cpu")

    # On a device.

    def prefill(
        self, params: ServeParams, state: ServeState, prompts: tuple[Prompts, Prompts]
    ) -> tuple[ServeState, jax.Array]:
        forward = self._forward(self.config.tokens_a_prefill // HALVES)

        def prefill(weights: Any, each: Prompts, earlier: Any = None) -> Any:
            params, tables = weights
            return forward.prefill(params, tables, each, earlier)

        done = run_interleaved(
            prefill,
            lambda *args: prefill(*args)[0],
            (params, state.balancer.tables),
            [prompts[0]],
            [prompts[1]],
            platform=self.platform,
        )
        for each, (tokens, latents, _) in zip(prompts, done, strict=True):
            state = self._insert(state, each, tokens, latents)
        (first, _, loads), (second, _, more) = done
        return self._observe(state, loads, more), jnp.stack([first, second])

    def decode(
        self, params: ServeParams, state: ServeState, is_idle: jax.Array
    ) -> tuple[ServeState, jax.Array]:
        forward = self._forward(self.config.requests_per_device // HALVES)
        halves = [
            Requests(
                state.tokens[half],
                state.positions[half],
                is_idle[half],
                jax.tree.map(lambda leaf, half=half: leaf[half], state.sampling),
            )
            for half in range(HALVES)
        ]

        def decode(weights: Any, each: Requests, caches: Any, _: Any = ()) -> Any:
            params, tables = weights
            return forward.decode(params, tables, each, caches)

        first, second = run_interleaved(
            lambda *args: (decode(*args), ()),
            decode,
            (params, state.balancer.tables),
            [halves[0], state.caches[0]],
            [halves[1], state.caches[1]],
            platform=self.platform,
        )
        tokens = jnp.stack([first[0], second[0]])
        state = state._replace(
            tokens=jnp.where(is_idle, state.tokens, tokens),
            positions=state.positions + (~is_idle).astype(jnp.int32),
            caches=(first[1], second[1]),
        )
        return self._observe(state, first[2], second[2]), tokens

    def rebalance(
        self, experts: PyTree, state: BalancerState
    ) -> tuple[PyTree, BalancerState]:
        experts, state, _ = self.balancer.rebalance(
            experts, state, axis_name=self.config.axis_name
        )
        return experts, state

    def move(
        self, experts: PyTree, old: ExpertTables, new: ExpertTables
    ) -> list[PyTree]:
        return [
            migrate(
                each,
                old.layer(layer),
                new.layer(layer),
                num_devices=self.config.num_devices,
                axis_name=self.config.axis_name,
            )
            for layer, each in enumerate(experts)
        ]

    def _observe(self, state: ServeState, *loads: Loads) -> ServeState:
        counts_LE = sum((each.counts for each in loads[1:]), loads[0].counts)
        return state._replace(
            balancer=self.balancer.observe(state.balancer, counts_LE),
            overflow=state.overflow + sum(each.overflow for each in loads),
        )

    def _insert(
        self, state: ServeState, prompts: Prompts, tokens_R: jax.Array, latents: list
    ) -> ServeState:
        """The state with what a microbatch of prompts has made."""
        held = self.config.requests_per_device // HALVES
        slot_T = jnp.where(prompts.rows < 0, -1, prompts.slots[prompts.rows])
        ended_R = jnp.where(prompts.last < 0, -1, prompts.slots)
        position_R = prompts.positions[prompts.last] + 1
        caches, requests = [], []
        for half in range(HALVES):
            # Negative indices would count from behind.
            at_T, at_R = (
                jnp.where(slot // held == half, slot % held, NOWHERE)
                for slot in (slot_T, ended_R)
            )
            caches.append(
                [
                    cache.at[at_T, prompts.positions].set(new, mode="drop")
                    for cache, new in zip(state.caches[half], latents, strict=True)
                ]
            )
            requests.append(
                jax.tree.map(
                    lambda old, new, at_R=at_R, half=half: (
                        old[half].at[at_R].set(new, mode="drop")
                    ),
                    (state.tokens, state.positions, state.sampling),
                    (tokens_R, position_R, prompts.sampling),
                )
            )
        tokens, positions, sampling = jax.tree.map(
            lambda *rows: jnp.stack(rows), *requests
        )
        return state._replace(
            tokens=tokens, positions=positions, sampling=sampling, caches=tuple(caches)
        )

    # Of all devices together.

    @property
    def _held(self) -> int:
        """Requests of a half."""
        return self.config.requests_per_device // HALVES * self.config.num_devices

    def init(self) -> ServeState:
        """No request."""
        c, held = self.config, self._held
        shape = (held, c.context_length, c.latent_width)
        return ServeState(
            tokens=jnp.zeros((HALVES, held), jnp.int32),
            positions=jnp.zeros((HALVES, held), jnp.int32),
            sampling=_greedy((HALVES, held)),
            caches=tuple(
                [
                    jnp.zeros(shape, c.compute_dtype)
                    for _ in range(c.architecture.num_hidden_layers)
                ]
                for _ in range(HALVES)
            ),
            balancer=self.balancer.init(),
            overflow=jnp.zeros((), jnp.int32),
        )

    def no_prompts(self) -> tuple[Prompts, Prompts]:
        c = self.config
        num_tokens = c.tokens_a_prefill // HALVES * c.num_devices
        num_rows = c.prompts_per_device // HALVES * c.num_devices

        def none(size: int, value: int) -> jax.Array:
            return jnp.full(size, value, jnp.int32)

        each = Prompts(
            tokens=none(num_tokens, 0),
            positions=none(num_tokens, 0),
            rows=none(num_tokens, -1),
            slots=none(num_rows, -1),
            last=none(num_rows, -1),
            sampling=_greedy((num_rows,)),
        )
        return each, each

    def no_requests(self) -> jax.Array:
        return jnp.ones((HALVES, self._held), bool)


def _greedy(shape: tuple[int, ...]) -> Sampling:
    return Sampling(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))
