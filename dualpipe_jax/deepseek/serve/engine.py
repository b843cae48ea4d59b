"""A small serving engine: continuous batching over fixed slots, live rebalancing.

It exists to show the steps and the balancer working, and stays small: no paging, no
prefix cache, no priorities. The host keeps queues and hands out slots; what experts do
it never looks at.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from dualpipe_jax.deepseek.serve.config import ServeConfig
from dualpipe_jax.deepseek.serve.forward import ServeParams
from dualpipe_jax.deepseek.serve.prompts import Halves, halve_prompts
from dualpipe_jax.deepseek.serve.requests import (
    Admitted,
    Request,
    Slot,
    as_prompt,
    check_options,
    prefill_arrays,
)
from dualpipe_jax.deepseek.serve.steps import HALVES, make_serve_programs

P = PartitionSpec


class Token(NamedTuple):
    """One token of a request, as soon as it is there.

    Attributes:
      request: the id that `submit` gave.
      token: what was written.
      is_last: whether the request is done.
    """

    request: int
    token: int
    is_last: bool


class Engine:
    """Serves requests; see `ServeConfig` for the sizes.

    Examples:
      >>> from configs import tiny_server
      >>> from dualpipe_jax.deepseek.serve import initial_params
      >>> config = tiny_server.config()
      >>> engine = Engine(config, initial_params(config))
      >>> request = engine.submit([72, 101], max_tokens=3)
      >>> engine.cancel(request)
      >>> list(engine.run()), engine.metrics()["num_waiting"]
      ([], 0.0)
    """

    def __init__(
        self, config: ServeConfig, params: ServeParams, *, mesh: Mesh | None = None
    ):
        """Puts the weights on the mesh; programs compile when they first run.

        Args:
          config: of the server.
          params: with the experts in the order of their slots: slot s has expert s
            modulo their number. Another placement: see `place`.
          mesh: with the axis `ep`; by default the first devices that jax has.

        Raises:
          ValueError: the mesh or the weights do not fit.
        """
        self.config = config
        self.programs = make_serve_programs(config, mesh)
        like = self.programs.abstract_params
        _check_shapes(params, like)
        placed: ServeParams = jax.tree.map(_put, params, like)
        # Copies: these change in place, and the caller keeps what is his.
        self.params = placed._replace(experts=jax.tree.map(jnp.copy, placed.experts))
        self.state = self.programs.init()
        self.num_prefills = self.num_decode_steps = self.num_tokens = 0
        self.seconds = 0.0
        self._measure = jax.jit(config.balancer.metrics)
        self._per_half = config.requests_per_device // HALVES
        self._is_idle = np.ones(self.programs.abstract_idle.shape, bool)
        self._requests: dict[int, Request] = {}
        self._running: dict[Slot, Request] = {}
        self._waiting: collections.deque[Request] = collections.deque()
        self._numbers = itertools.count()
        self._undelivered: collections.deque[Token] = collections.deque()

    def compile(self) -> None:
        """Compiles all programs now; nothing compiles after that."""
        self.programs = self.programs.compile()
        self.metrics()

    # Requests.

    def submit(
        self,
        prompt: ArrayLike,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token: int | None = None,
    ) -> int:
        """Queues a request.

        Args:
          prompt: [n] integers.
          max_tokens: to write at most.
          temperature: 0 takes the likeliest token each time.
          seed: decides what is drawn at a temperature, whatever else is served (unless
            `buffer_factor` loses choices, which depends on all of them).
          stop_token: the token that ends it; it is written too.

        Returns:
          The request's id.

        Raises:
          ValueError: an empty prompt, one that is too long, one of other tokens than
            the model's, or a bad option. Other requests go on.
        """
        tokens = as_prompt(self.config, prompt, max_tokens)
        check_options(temperature, seed)
        request = Request(
            next(self._numbers), tokens, max_tokens, temperature, seed, stop_token
        )
        self._requests[request.number] = request
        self._waiting.append(request)
        return request.number

    def cancel(self, request: int) -> None:
        """Ends a request early; `run` yields nothing more of it.

        Raises:
          ValueError: there is no such request, or it is done.
        """
        found = self._requests.get(request)
        kept = [token for token in self._undelivered if token.request != request]
        was_awaited = len(kept) < len(self._undelivered)
        self._undelivered = collections.deque(kept)
        if found is None:
            if was_awaited:
                return
            raise ValueError(
                f"{request=} is unknown: it was never submitted, or it is done."
            )
        if found.slot is None:
            self._waiting.remove(found)
        self._end(found)

    def step(self) -> list[Token]:
        """Runs a prefill, if a request waits and a slot is free, or a decode step.

        Returns:
          What was written; empty if there is nothing to do.
        """
        started = time.perf_counter()
        admitted = self._admit()
        tokens = self._prefill(admitted) if admitted else self._decode()
        self.num_tokens += len(tokens)
        self.seconds += time.perf_counter() - started
        return tokens

    def run(self) -> Iterator[Token]:
        """Steps until no request is left; who stops in between may go on later."""
        while self._undelivered or self._requests:
            if not self._undelivered:
                self._undelivered.extend(self.step())
            while self._undelivered:
                yield self._undelivered.popleft()

    def generate(
        self, prompts: Sequence[ArrayLike], *, max_tokens: int, **options: Any
    ) -> list[np.ndarray]:
        """Completions of prompts, when all are done.

        Other requests go on meanwhile; `run` yields their tokens afterwards.

        Args:
          prompts: each [n] integers.
          max_tokens: see `submit`.
          **options: see `submit`.

        Returns:
          For each an array of tokens.

        Raises:
          ValueError: see `submit`; nothing is queued then.
        """
        for prompt in prompts:
            as_prompt(self.config, prompt, max_tokens)
        written: dict[int, list[int]] = {
            self.submit(prompt, max_tokens=max_tokens, **options): []
            for prompt in prompts
        }
        missing, others = set(written), []
        while missing:
            token = next(self.run())
            if token.request not in written:
                others.append(token)
                continue
            written[token.request].append(token.token)
            if token.is_last:
                missing.remove(token.request)
        self._undelivered.extendleft(reversed(others))
        return [np.array(tokens, np.int32) for tokens in written.values()]

    def _admit(self) -> list[Admitted]:
        """By device, the requests that begin; empty if nobody can."""
        c = self.config
        num_rows = c.prompts_per_device // HALVES
        free = self._free_slots()
        admitted = [
            Admitted([], Halves([None] * num_rows, [None] * num_rows))
            for _ in range(c.num_devices)
        ]
        while self._waiting:
            request = self._waiting[0]
            # First where most slots are free; a full one may still have other room.
            for device in sorted(range(c.num_devices), key=lambda d: -len(free[d])):
                own = [*admitted[device].requests, request]
                lengths = [len(each.prompt) for each in own]
                halves = None
                if free[device]:
                    halves = halve_prompts(lengths, c.tokens_a_prefill // 2, num_rows)
                if halves is not None:
                    request.slot = free[device].pop(0)
                    admitted[device] = Admitted(own, halves)
                    break
            else:
                break
            self._waiting.popleft()
        return admitted if any(own for own, _ in admitted) else []

    def _free_slots(self) -> list[list[Slot]]:
        """By device; the halves take turns."""
        every = [
            [
                Slot(half, device * self._per_half + i)
                for i in range(self._per_half)
                for half in range(HALVES)
            ]
            for device in range(self.config.num_devices)
        ]
        return [[slot for slot in own if self._is_idle[slot]] for own in every]

    def _prefill(self, admitted: list[Admitted]) -> list[Token]:
        batches, ending = zip(
            *(prefill_arrays(self.config, admitted, half) for half in range(HALVES)),
            strict=True,
        )
        for own, _ in admitted:
            for request in own:
                assert request.slot is not None
                self._running[request.slot] = request
                self._is_idle[request.slot] = False
        prompts = jax.tree.map(_put, batches, self.programs.abstract_prompts)
        self.state, tokens = self.programs.prefill(self.params, self.state, prompts)
        self.num_prefills += 1
        tokens = np.asarray(tokens)
        return [
            self._take(request, int(tokens[half, row]))
            for half, requests in enumerate(ending)
            for row, request in enumerate(requests)
            if request is not None
        ]

    def _decode(self) -> list[Token]:
        if not self._running:
            return []
        # A copy: on CPU the array may be the one that is written to next.
        is_idle = _put(self._is_idle.copy(), self.programs.abstract_idle)
        self.state, tokens = self.programs.decode(self.params, self.state, is_idle)
        self.num_decode_steps += 1
        plan = self.config.rebalance
        if plan is not None and self.num_decode_steps % plan.every == 0:
            self._rebalance()
        tokens = np.asarray(tokens)
        running = list(self._running.items())
        return [self._take(request, int(tokens[slot])) for slot, request in running]

    def _take(self, request: Request, token: int) -> Token:
        is_last = request.write(token)
        if is_last:
            self._end(request)
        return Token(request.number, token, is_last)

    def _end(self, request: Request) -> None:
        del self._requests[request.number]
        if request.slot is not None:
            self._is_idle[request.slot] = True
            self._running.pop(request.slot)

    # Experts.

    def _rebalance(self) -> None:
        # The host asks for it, and reads nothing of it.
        experts, balancer = self.programs.rebalance(
            self.params.experts, self.state.balancer
        )
        self.params = self.params._replace(experts=experts)
        self.state = self.state._replace(balancer=balancer)

    def _leave_devices(self) -> None:
        """Moves all experts away from devices of speed 0, if there are any."""
        if (np.asarray(self.state.balancer.capacity) > 0).all():
            return
        balancer = self.config.balancer
        at_once = balancer.layers_per_plan or balancer.num_layers
        for _ in range(-(-balancer.num_layers // at_once)):
            self._rebalance()

    def set_capacity(self, capacity: ArrayLike) -> None:
        """Tells the devices' speeds; all experts leave one of speed 0 at once.

        Requests on that device go on, since their caches are there: docs/serving.md
        says what to do about a device that is gone.

        Args:
          capacity: [devices] relative speeds.

        Raises:
          ValueError: values that are no speeds, or the devices left have too few slots
            for all experts; the old speeds stay.
        """
        state = self.config.balancer.with_capacity(self.state.balancer, capacity)
        self.state = self.state._replace(balancer=state)
        self._leave_devices()

    def place(self, placement: ArrayLike) -> None:
        """Moves the experts to a placement: of `rebalance_experts`, for known loads.

        Args:
          placement: [layers, slots] int32.

        Raises:
          ValueError: it is another model's, or leaves an expert out; the old one stays.
        """
        tables = self.config.balancer.init(np.asarray(placement)).tables
        tables.validate()
        tables = jax.device_put(tables, NamedSharding(self.programs.mesh, P()))
        old = self.state.balancer
        experts = self.programs.move(self.params.experts, old.tables, tables)
        self.params = self.params._replace(experts=experts)
        self.state = self.state._replace(balancer=old._replace(tables=tables))
        self._leave_devices()

    def metrics(self) -> dict[str, float]:
        """What to log: the balancer's metrics, the queue, and what was done so far."""
        measured = self._measure(self.state.balancer)
        measured["num_overflowed"] = self.state.overflow
        rate = self.num_tokens / self.seconds if self.seconds else 0.0
        counts = {
            "num_waiting": len(self._waiting),
            "num_running": len(self._running),
            "num_prefills": self.num_prefills,
            "num_decode_steps": self.num_decode_steps,
            "num_tokens": self.num_tokens,
            "tokens_per_s": rate,
        }
        return {name: float(value) for name, value in (measured | counts).items()}


def _put(leaf: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(leaf, like.sharding)


def _check_shapes(params: ServeParams, like: ServeParams) -> None:
    advice = "make them with its architecture, num_redundant and compute_dtype."
    if jax.tree.structure(params) != jax.tree.structure(like):
        raise ValueError(f"params have another structure than the config's; {advice}")
    found = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), wanted in zip(found, jax.tree.leaves(like), strict=True):
        if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {leaf.dtype}, {leaf.shape}, "
                f"but the config's is {wanted.dtype}, {wanted.shape}; {advice}"
            )
