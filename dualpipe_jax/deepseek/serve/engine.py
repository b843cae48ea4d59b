"""A small serving engine: continuous batching, and experts that are moved meanwhile.

It exists to show the steps and the balancer at work, and stays small: no paging, no
prefix cache, no priorities.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from dualpipe_jax.deepseek.serve.arrays import ServeParams
from dualpipe_jax.deepseek.serve.config import HALVES, ServeConfig
from dualpipe_jax.deepseek.serve.programs import make_serve_programs
from dualpipe_jax.deepseek.serve.requests import (
    Request,
    RequestSlot,
    as_prompt,
    check_options,
)
from dualpipe_jax.deepseek.serve.results import Step, Token
from dualpipe_jax.deepseek.serve.scheduler import Admitted, Scheduler, prefill_arrays
from dualpipe_jax.train import CompileProgress

P = PartitionSpec
# Steps that the device has, the one that runs among them, while the host reads.
_AHEAD = 2


class Engine:
    """Serves requests; see `ServeConfig` for the sizes.

    Examples:
      >>> from dualpipe_jax.configs import tiny_server
      >>> from dualpipe_jax.deepseek.serve import initial_params
      >>> config = tiny_server.config()
      >>> engine = Engine(config, initial_params(config))
      >>> request = engine.submit([72, 101], max_tokens=3)
      >>> engine.cancel(request)
      >>> list(engine.run()), engine.metrics()["num_waiting"]
      ([], 0.0)
    """

    def __init__(
        self,
        config: ServeConfig,
        params: ServeParams,
        *,
        mesh: Mesh | None = None,
        placement: ArrayLike | None = None,
    ):
        """Puts the weights on the mesh; programs compile when they first run.

        Args:
          config: of the server.
          params: weights.
          mesh: with the axis `ep`; by default the first devices that jax has.
          placement: [layers, physical experts] int32, the expert whose weights each
            physical expert has in `params`; None: physical expert i has those of expert
            i modulo their number. `place` changes it.

        Raises:
          ValueError: the mesh, the weights or the placement do not fit.
        """
        self.config = config
        self.programs = make_serve_programs(config, mesh)
        like = self.programs.abstract_params
        _check_shapes(params, like)
        placed: ServeParams = jax.tree.map(_put, params, like)
        # Copies, because these change in place; the caller's arrays stay as they are.
        self.params = placed._replace(experts=jax.tree.map(jnp.copy, placed.experts))
        given = config.placement_in_order if placement is None else placement
        self.state = self.programs.init(np.asarray(given))
        if placement is not None:
            self.state.balancer.tables.validate()
        self.num_prefills = self.num_decode_steps = self.num_tokens = 0
        self.seconds = 0.0
        self._measure = jax.jit(config.balancer.metrics)
        self._measure_layers = jax.jit(config.balancer.layer_metrics)
        self._scheduler = Scheduler(config)
        self._numbers = itertools.count()
        self._undelivered: collections.deque[Token] = collections.deque()
        self._in_flight: collections.deque[Step] = collections.deque()
        self._is_after_prefill = False
        # The free request slots, here and on the devices, as in the last decode step.
        self._is_idle = self._scheduler.is_idle.copy()
        self._is_idle_put = _put(self._is_idle, self.programs.abstract_idle)

    def compile(self, progress: CompileProgress | None = None) -> None:
        """Compiles the steps' programs now; no step compiles anything after that.

        Args:
          progress: where to show what compiles.
        """
        self.programs = self.programs.compile(progress)
        self.metrics()
        self.layer_metrics()

    # Requests.

    def submit(
        self,
        prompt: ArrayLike,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_p: float = 1.0,
        num_logprobs: int | None = None,
        stop_tokens: Collection[int] = (),
    ) -> int:
        """Queues a request.

        Args:
          prompt: [n] integers.
          max_tokens: most tokens to generate.
          temperature: 0 takes the most likely token each time.
          seed: of the draws at a temperature. They do not depend on the other requests
            (unless `buffer_factor` drops choices, which depends on all of them).
          top_p: at a temperature, draw from the most likely tokens whose probabilities
            add up to this only.
          num_logprobs: report the log probability of each token, and this many of the
            most likely tokens with theirs.
          stop_tokens: tokens that end the request; the one that does is part of the
            completion.

        Returns:
          The request's id.

        Raises:
          ValueError: a prompt that is empty, too long, or of another vocabulary, or an
            invalid option. Other requests are not affected.
        """
        tokens = self.check(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            top_p=top_p,
            num_logprobs=num_logprobs,
        )
        request = Request(
            next(self._numbers),
            tokens,
            max_tokens,
            temperature,
            seed,
            top_p,
            num_logprobs,
            frozenset(stop_tokens),
        )
        self._scheduler.add(request)
        return request.number

    def check(
        self,
        prompt: ArrayLike,
        *,
        max_tokens: int,
        stop_tokens: Collection[int] = (),
        **options: Any,
    ) -> np.ndarray:
        """Checks the arguments of `submit`; any thread may call this.

        Returns:
          The prompt, [n] int32.

        Raises:
          ValueError: see `submit`.
        """
        del stop_tokens  # any are allowed
        check_options(max_tokens, **options)
        return as_prompt(self.config, prompt, max_tokens)

    def cancel(self, request: int) -> None:
        """Ends a request early; `run` yields no more of its tokens.

        Raises:
          ValueError: there is no such request, or it is finished.
        """
        kept = [token for token in self._undelivered if token.request != request]
        has_undelivered = len(kept) < len(self._undelivered)
        self._undelivered = collections.deque(kept)
        if request in self._scheduler:
            self._scheduler.cancel(request)
        elif not has_undelivered:
            raise ValueError(
                f"{request=} is unknown: it was never submitted, or it is finished."
            )

    def step(self) -> list[Token]:
        """Starts a step, and reads the tokens of the one before.

        A step is a prefill if a waiting request can start, else a decode step. The
        device has the next step before the host reads the last one's tokens, so it does
        not wait for the host. A token that is computed after a stop token, because of
        that, is left out.

        Returns:
          The tokens of a step. It is empty if there are no requests, or if the step has
          only computed pieces of prompts, or tokens of requests that have ended.
        """
        started = time.perf_counter()
        tokens: list[Token] = []
        while len(self._in_flight) < _AHEAD and self._start_step():
            pass
        if self._in_flight:
            tokens = self._read(self._in_flight.popleft())
        self.num_tokens += len(tokens)
        self.seconds += time.perf_counter() - started
        return tokens

    def run(self) -> Iterator[Token]:
        """Yields tokens until no request is left; another call continues."""
        while self._undelivered or len(self._scheduler):
            if not self._undelivered:
                self._undelivered.extend(self.step())
            while self._undelivered:
                yield self._undelivered.popleft()

    def generate(
        self, prompts: Sequence[ArrayLike], *, max_tokens: int, **options: Any
    ) -> list[np.ndarray]:
        """Returns the completions of prompts, when all are finished.

        Other requests run meanwhile; `run` yields their tokens afterwards.

        Args:
          prompts: each [n] integers.
          max_tokens: see `submit`.
          **options: see `submit`.

        Returns:
          For each prompt an array of tokens.

        Raises:
          ValueError: see `submit`; no prompt is queued then.
        """
        for prompt in prompts:
            self.check(prompt, max_tokens=max_tokens, **options)
        generated: dict[int, list[int]] = {
            self.submit(prompt, max_tokens=max_tokens, **options): []
            for prompt in prompts
        }
        missing, others = set(generated), []
        while missing:
            token = next(self.run())
            if token.request not in generated:
                others.append(token)
                continue
            generated[token.request].append(token.token)
            if token.is_last:
                missing.remove(token.request)
        self._undelivered.extendleft(reversed(others))
        return [np.array(tokens, np.int32) for tokens in generated.values()]

    def _start_step(self) -> bool:
        """Starts a step if there is anything to compute; returns whether it did."""
        running = self._scheduler.running()
        # Between two pieces of long prompts, the others get a token each.
        is_turn = self._is_after_prefill and self.config.has_pieces
        admitted = [] if running and is_turn else self._scheduler.admit()
        if admitted:
            self._in_flight.append(self._prefill(admitted))
        elif running:
            self._in_flight.append(self._decode(running))
        else:
            return False
        self._is_after_prefill = bool(admitted)
        for _, request in self._in_flight[-1].places:
            self._scheduler.start_token(request)
        return True

    def _prefill(self, admitted: list[Admitted]) -> Step:
        batches, ending = zip(
            *(prefill_arrays(self.config, admitted, half) for half in range(HALVES)),
            strict=True,
        )
        prompts = jax.tree.map(_put, batches, self.programs.abstract_prompts)
        self.state, chosen = self.programs.prefill(self.params, self.state, prompts)
        self.num_prefills += 1
        self._rebalance_if_due()
        places = [
            ((half, row), request)
            for half, requests in enumerate(ending)
            for row, request in enumerate(requests)
            if request is not None
        ]
        return Step(places, chosen)

    def _decode(self, running: list[tuple[RequestSlot, Request]]) -> Step:
        if not np.array_equal(self._is_idle, self._scheduler.is_idle):
            # A copy: on CPU jax may use the array itself, which changes before the step
            # ends.
            self._is_idle = self._scheduler.is_idle.copy()
            self._is_idle_put = _put(self._is_idle, self.programs.abstract_idle)
        self.state, chosen = self.programs.decode(
            self.params, self.state, self._is_idle_put
        )
        self.num_decode_steps += 1
        self._rebalance_if_due()
        return Step(running, chosen)

    def _read(self, step: Step) -> list[Token]:
        """Waits for a step, and returns the tokens of requests that have not ended."""
        tokens = []
        for request, token in step.read():
            if token.is_last:
                self._scheduler.end(request)
            tokens.append(token)
        return tokens

    # Experts.

    def _rebalance_if_due(self) -> None:
        plan, num_steps = (
            self.config.rebalance,
            self.num_prefills + self.num_decode_steps,
        )
        if plan is not None and num_steps % plan.every == 0:
            self._rebalance()

    def _rebalance(self) -> None:
        # The host starts it, and does not read its result.
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
        """Sets the devices' speeds; all experts leave a device of speed 0 at once.

        Requests on that device continue, since their caches are there; docs/serving.md
        says what to do about a device that is lost.

        Args:
          capacity: [devices] relative speeds.

        Raises:
          ValueError: invalid speeds, or too few physical experts on the devices that
            are left; the old speeds stay.
        """
        state = self.config.balancer.with_capacity(self.state.balancer, capacity)
        self.state = self.state._replace(balancer=state)
        self._leave_devices()

    def place(self, placement: ArrayLike) -> None:
        """Moves the experts to a placement, such as `rebalance_experts` returns.

        Args:
          placement: [layers, physical experts] int32.

        Raises:
          ValueError: it is of another model, or leaves an expert out; the old one
            stays.
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
        """Returns the balancer's metrics, the queue's lengths, and totals so far."""
        measured = self._measure(self.state.balancer)
        measured["num_overflowed"] = self.state.overflow
        measured["num_fetched"] = self.state.num_fetched
        rate = self.num_tokens / self.seconds if self.seconds else 0.0
        counts = {
            "num_waiting": self._scheduler.num_waiting,
            "num_running": self._scheduler.num_running,
            "num_prefills": self.num_prefills,
            "num_decode_steps": self.num_decode_steps,
            "num_tokens": self.num_tokens,
            "tokens_per_s": rate,
        }
        return {name: float(value) for name, value in (measured | counts).items()}

    def layer_metrics(self) -> dict[str, np.ndarray]:
        """Returns `ExpertBalancer.layer_metrics`, for all MoE layers."""
        measured = self._measure_layers(self.state.balancer)
        return {name: np.asarray(value) for name, value in measured.items()}


def _put(leaf: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(leaf, like.sharding)


def _check_shapes(params: ServeParams, like: ServeParams) -> None:
    advice = "make them for its architecture, num_redundant and compute_dtype."
    if jax.tree.structure(params) != jax.tree.structure(like):
        raise ValueError(f"params have another structure than the config's; {advice}")
    found = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), wanted in zip(found, jax.tree.leaves(like), strict=True):
        if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {leaf.dtype}, {leaf.shape}, "
                f"but the config's is {wanted.dtype}, {wanted.shape}; {advice}"
            )
