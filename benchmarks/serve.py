"""What a decode step spends on observing and planning, on eight virtual CPU devices.

    python benchmarks/serve.py

Rounds take turns (a few decode steps, a few rebalances, a few observations), so that
what else the machine does meets all of them; the ratio of their medians is what counts.
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

from configs import tiny_server
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
    balancer = config.balancer
    sharding = jax.tree.map(lambda leaf: leaf.sharding, engine.state.balancer)

    def observe_often(state, counts):
        # In a step it costs no call of its own.
        return jax.lax.fori_loop(
            0, OFTEN, lambda _, state: balancer.observe(state, counts), state
        )

    observe = jax.jit(observe_often, donate_argnums=0, out_shardings=sharding)
    counts = jax.device_put(
        np.ones((balancer.num_layers, balancer.num_experts), np.int32),
        engine.state.balancer.step.sharding,
    )
    idle = np.zeros(engine.programs.abstract_idle.shape, bool)
    idle = jax.device_put(idle, engine.programs.abstract_idle.sharding)

    def decode():
        # Positions stand still: else requests would leave the cache.
        state = engine.state
        engine.state, tokens = engine.programs.decode(engine.params, state, idle)
        return tokens

    def plan():
        engine._rebalance()
        return engine.state.balancer

    def watch():
        state = observe(engine.state.balancer, counts)
        engine.state = engine.state._replace(balancer=state)
        return state

    times = {name: [] for name in ("decode", "rebalance", "observe")}
    programs = {"decode": decode, "rebalance": plan, "observe": watch}
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
