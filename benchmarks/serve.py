"""Share of a decode step that observing and planning take, on eight CPU devices.

    python benchmarks/serve.py

Each round times a few decode steps, a few rebalances and a few observations, so that
other work on the machine affects all of them; compare the ratios of their medians.
"""

import functools
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np

from dualpipe_jax.configs import tiny_server
from dualpipe_jax.deepseek.serve import Engine, initial_params

ROUNDS, STEPS, OFTEN = 12, 16, 100


def seconds(function, steps=STEPS):
    started = time.perf_counter()
    for _ in range(steps):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / steps


def main():
    config = tiny_server.config()
    engine = Engine(config, initial_params(config))
    engine.compile()
    rng = np.random.default_rng(0)
    for _ in range(config.num_devices * config.requests_per_device):
        engine.submit(rng.integers(0, 256, 16), max_tokens=240)
    engine.step()
    expert_balancer = config.balancer
    sharding = jax.tree.map(lambda leaf: leaf.sharding, engine.state.balancer)

    def observe_often(state, counts):
        # In a step, it is part of the program and costs no separate call.
        return jax.lax.fori_loop(
            0, OFTEN, lambda _, state: expert_balancer.observe(state, counts), state
        )

    observe = jax.jit(observe_often, donate_argnums=0, out_shardings=sharding)
    counts = jax.device_put(
        np.ones((expert_balancer.num_layers, expert_balancer.num_experts), np.int32),
        engine.state.balancer.step.sharding,
    )
    idle = np.zeros(engine.programs.abstract_idle.shape, bool)
    idle = jax.device_put(idle, engine.programs.abstract_idle.sharding)

    def decode():
        # `main` resets the positions, or requests would run out of the cache.
        state = engine.state
        engine.state, tokens = engine.programs.decode(engine.params, state, idle)
        return tokens

    def plan():
        experts, balancer = engine.programs.rebalance(
            engine.params.experts, engine.state.balancer
        )
        engine.params = engine.params._replace(experts=experts)
        engine.state = engine.state._replace(balancer=balancer)
        return balancer

    def observe_once():
        state = observe(engine.state.balancer, counts)
        engine.state = engine.state._replace(balancer=state)
        return state

    times = {name: [] for name in ("decode", "rebalance", "observe")}
    programs = {"decode": decode, "rebalance": plan, "observe": observe_once}
    positions = np.asarray(engine.state.positions)
    for _ in range(ROUNDS):
        reset = jax.device_put(positions, engine.state.positions.sharding)
        engine.state = engine.state._replace(positions=reset)
        for name, function in programs.items():
            times[name].append(seconds(functools.partial(function)))
    median = {name: statistics.median(each) for name, each in times.items()}
    median["observe"] /= OFTEN
    every = config.rebalance.every
    spent = median["observe"] + median["rebalance"] / every
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {config.name}")
    for name, value in median.items():
        print(f"{name:<10} {1e3 * value:8.3f} ms")
    print(
        f"observing each step and planning every {every}: "
        f"{spent / median['decode']:.2%} of a decode step"
    )
    metrics = engine.metrics()
    print(
        f"balancedness {metrics['balancedness']:.3f}, {metrics['num_moves']:.0f} moves"
    )


if __name__ == "__main__":
    main()
