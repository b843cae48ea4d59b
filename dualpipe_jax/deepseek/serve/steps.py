"""The steps of a server as one device runs them, and the values that they start from.

Shape suffixes: see `dualpipe_jax.deepseek`; in the values of all devices together, axes
of tokens, rows and requests go over all devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax.backward import run_interleaved
from dualpipe_jax.deepseek.serve.arrays import (
    Chosen,
    Loads,
    Prompts,
    Requests,
    Sampling,
    ServeParams,
    ServeState,
)
from dualpipe_jax.deepseek.serve.config import HALVES, ServeConfig
from dualpipe_jax.deepseek.serve.forward import Forward
from dualpipe_jax.deepseek.serve.rows import place_in_half, start_and_stop
from dualpipe_jax.deepseek.serve.sampling import choose_tokens, greedy
from dualpipe_jax.gpu import Gpu
from eplb_jax import BalancerState, ExpertBalancer, ExpertTables, migrate
from eplb_jax.placement import add_saturating, take_or_zero

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Steps:
    """What the programs run on a device, and arguments for all devices together.

    Attributes:
      config: of the server.
      platform: of the mesh.
      gpu: of the mesh, if it is one whose peaks are known.
    """

    config: ServeConfig
    platform: str | None
    gpu: Gpu | None = None

    @property
    def balancer(self) -> ExpertBalancer:
        """The balancer of all MoE layers."""
        return self.config.balancer

    def _forward(self, num_tokens: int) -> Forward:
        return Forward(
            self.config,
            num_tokens,
            is_on_gpu=self.platform != "cpu",
            is_exact=self.config.is_exact(num_tokens, self.gpu),
        )

    # On a device.

    def prefill(
        self, params: ServeParams, state: ServeState, prompts: tuple[Prompts, Prompts]
    ) -> tuple[ServeState, Chosen]:
        """Computes prompts; returns the state with them, and what follows, [2, B]."""
        forward = self._forward(self.config.max_prefill_tokens // HALVES)

        def prefill(weights: Any, each: Prompts, handed: Any) -> Any:
            params, tables, caches = weights
            return forward.prefill(params, tables, each, handed, caches)

        caches = state.caches if self.config.has_pieces else None
        weights = params, state.balancer.tables, caches
        done = self._run_halves(prefill, weights, [[each] for each in prompts])
        logits, latents, loads = zip(*done, strict=True)
        position_HB = _stacked(
            [take_or_zero(each.positions, each.last) for each in prompts]
        )
        sampling = _stacked([each.sampling for each in prompts])
        chosen = _choose(_stacked(logits), position_HB + 1, sampling)
        for each, tokens_B, own in zip(prompts, chosen.tokens, latents, strict=True):
            state = self._insert(state, each, tokens_B, own)
        return self._observe(state, *loads), chosen

    def decode(
        self, params: ServeParams, state: ServeState, is_idle: jax.Array
    ) -> tuple[ServeState, Chosen]:
        """Computes the next token of each request; returns the state and [2, B]."""
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

        def decode(weights: Any, each: Requests, caches: Any, _: Any) -> Any:
            params, tables = weights
            return forward.decode(params, tables, each, caches), ()

        weights = params, state.balancer.tables
        inputs = [list(each) for each in zip(halves, state.caches, strict=True)]
        done = self._run_halves(decode, weights, inputs)
        logits, caches, loads = zip(*done, strict=True)
        chosen = _choose(_stacked(logits), state.positions + 1, state.sampling)
        state = state._replace(
            tokens=jnp.where(is_idle, state.tokens, chosen.tokens),
            positions=state.positions + (~is_idle).astype(jnp.int32),
            caches=tuple(caches),
        )
        return self._observe(state, *loads), chosen

    def _run_halves(
        self, run: Any, weights: Any, halves: list[list[Any]]
    ) -> tuple[Any, Any]:
        """Runs both halves, overlapped where there is anything to overlap.

        CPUs overlap nothing, and one device exchanges nothing.

        Args:
          run: from (weights, *inputs, handed) to (outputs, handed), where the second
            half gets what the first one hands on, and the first gets None.
          weights: that both read.
          halves: inputs of each.

        Returns:
          The outputs of each.
        """
        if self.platform == "cpu" or self.config.axis_name is None:
            first, handed = run(weights, *halves[0], None)
            return first, run(weights, *halves[1], handed)[0]
        return run_interleaved(
            lambda *args: run(*args, None),
            lambda *args: run(*args)[0],
            weights,
            *halves,
            platform=self.platform,
        )

    def rebalance(
        self, experts: PyTree, state: BalancerState
    ) -> tuple[PyTree, BalancerState]:
        """Plans, and moves the experts that the plan changes."""
        experts, state, _ = self.balancer.rebalance(
            experts, state, axis_name=self.config.axis_name
        )
        return experts, state

    def move(
        self, experts: PyTree, old: ExpertTables, new: ExpertTables
    ) -> list[PyTree]:
        """Moves experts from the places of one table to those of another."""
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
        first, *others = (each.tokens_per_expert for each in loads)
        counts_LE = sum(others, first)
        overflow, fetched = state.overflow, state.num_fetched
        for each in loads:
            overflow = add_saturating(overflow, each.overflow)
            fetched = add_saturating(fetched, each.num_fetched)
        return state._replace(
            balancer=self.balancer.observe(state.balancer, counts_LE),
            overflow=overflow,
            num_fetched=fetched,
        )

    def _insert(
        self, state: ServeState, prompts: Prompts, tokens_B: jax.Array, latents: list
    ) -> ServeState:
        """Writes the results of a microbatch of prompts into the state."""
        slots = prompts.request_slots
        slot_M = jnp.where(prompts.rows < 0, -1, slots[prompts.rows])
        ended_B = jnp.where(prompts.last < 0, -1, slots)
        position_B = prompts.positions[prompts.last] + 1
        if self.config.has_pieces:
            # Until a prompt is complete, decode steps write what nobody reads: where
            # its next piece begins, which comes after.
            ended_B, position_B = slots, start_and_stop(prompts)[1]
        caches, requests = [], []
        for half in range(HALVES):
            at_M, at_B = (
                place_in_half(slot, half, self.config.requests_per_device)
                for slot in (slot_M, ended_B)
            )
            caches.append(
                [
                    cache.at[at_M, prompts.positions].set(new, mode="drop")
                    for cache, new in zip(state.caches[half], latents, strict=True)
                ]
            )
            requests.append(
                jax.tree.map(
                    lambda old, new, at_B=at_B, half=half: (
                        old[half].at[at_B].set(new, mode="drop")
                    ),
                    (state.tokens, state.positions, state.sampling),
                    (tokens_B, position_B, prompts.sampling),
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
    def _requests_per_half(self) -> int:
        return self.config.requests_per_device // HALVES * self.config.num_devices

    def init(self, placement: jax.Array) -> ServeState:
        """Returns the state of a server without requests, for a placement [L, X]."""
        c, num_requests = self.config, self._requests_per_half
        shape = (num_requests, c.context_length, c.latent_width)
        return ServeState(
            tokens=jnp.zeros((HALVES, num_requests), jnp.int32),
            positions=jnp.zeros((HALVES, num_requests), jnp.int32),
            sampling=greedy((HALVES, num_requests)),
            caches=tuple(
                [
                    jnp.zeros(shape, c.compute_dtype)
                    for _ in range(c.architecture.num_hidden_layers)
                ]
                for _ in range(HALVES)
            ),
            balancer=self.balancer.init(placement),
            overflow=jnp.zeros((), jnp.int32),
            num_fetched=jnp.zeros((), jnp.int32),
        )

    def no_prompts(self) -> tuple[Prompts, Prompts]:
        """Returns two empty microbatches of a prefill."""
        c = self.config
        num_tokens = c.max_prefill_tokens // HALVES * c.num_devices
        num_rows = c.prompts_per_device // HALVES * c.num_devices

        def none(size: int, value: int) -> jax.Array:
            return jnp.full(size, value, jnp.int32)

        each = Prompts(
            tokens=none(num_tokens, 0),
            positions=none(num_tokens, 0),
            rows=none(num_tokens, -1),
            request_slots=none(num_rows, -1),
            last=none(num_rows, -1),
            sampling=greedy((num_rows,)),
        )
        return each, each

    def all_idle(self) -> jax.Array:
        """Returns [2, B] bool: all request slots are free."""
        return jnp.ones((HALVES, self._requests_per_half), bool)


def _stacked(halves: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *halves)


def _choose(
    logits_HBU: jax.Array, position_HB: jax.Array, sampling: Sampling
) -> Chosen:
    """Chooses the next tokens [2, B] of both halves, when both are computed.

    If each half chose its own, the last exchange of a decode step would be under no
    product: the choice is conditional, and stands in the way of the other half's.
    """
    flat = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]),
        (logits_HBU, position_HB, sampling),
    )
    return jax.tree.map(
        lambda leaf: leaf.reshape(*position_HB.shape, *leaf.shape[1:]),
        choose_tokens(*flat),
    )
