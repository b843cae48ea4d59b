"""What a pipelined step costs beside the same model without a pipeline, on CPU.

Run: JAX_PLATFORMS=cpu python benchmarks/pipeline.py [--quick]

Every figure is a ratio of two things measured in this one process, or a count.
Times are CPU time of the whole process (all threads), so that waiting ranks cost
nothing and the number of cores does not matter.
"""

import argparse
import os
import platform
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from dualpipe_jax import (
    Costs,
    PipelineParams,
    dualpipe,
    dualpipev,
    gpipe,
    lower,
    one_f_one_b,
    pipeline_value_and_grad,
    simulate,
    zb1p,
)

# DeepSeek's published training trace, milliseconds of one chunk.
REAL = Costs(F=97, I=104, W=35, B=139, FB=129, p2p=1.2)
KINDS = (dualpipe, dualpipev, zb1p, one_f_one_b, gpipe)


def stage_fn(layers, x):
    for layer in layers:
        scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        h = x * scale
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return x


def mse(_, y, targets):
    return jnp.mean(jnp.square(y - targets))


def make_stages(num_stages, num_layers, width, hidden):
    def normal(key, *shape):
        return jax.random.normal(key, (num_stages, *shape)) / jnp.sqrt(shape[0])

    layers = []
    for key in jax.random.split(jax.random.key(0), num_layers):
        gate, up, down = jax.random.split(key, 3)
        layers.append(
            {
                "gate": normal(gate, width, hidden),
                "up": normal(up, width, hidden),
                "down": normal(down, hidden, width),
            }
        )
    return layers


def unpipelined(num_stages, num_microbatches):
    """The same gradients: microbatches one after the other, on one device."""

    def loss(stages, x, t):
        for stage in range(num_stages):
            x = stage_fn(jax.tree.map(lambda a, s=stage: a[s], stages), x)
        return mse(None, x, t) / num_microbatches

    @jax.jit
    def step(stages, inputs, targets):
        def body(m, carry):
            total, grads = carry
            loss_m, new = jax.value_and_grad(loss)(stages, inputs[m], targets[m])
            return total + loss_m, jax.tree.map(jnp.add, grads, new)

        zeros = jax.tree.map(jnp.zeros_like, stages)
        return jax.lax.fori_loop(0, num_microbatches, body, (0.0, zeros))

    return step


def cpu_seconds(fn, *args):
    start = time.process_time()
    jax.block_until_ready(fn(*args))
    return time.process_time() - start


def overhead(kind, runs, ranks=4, microbatches=8, tokens=256, width=1024, hidden=2048):
    """Pairs of (pipelined, unpipelined) CPU times of one step each.

    A narrower stage does less work for each byte that it keeps, and XLA:CPU, which
    drops optimization barriers, copies what is kept (docs/design.md): at width 512
    and 1024 tokens the ratio is 1.2 to 1.3.
    """
    schedule = kind(ranks, microbatches)
    mesh = jax.make_mesh(
        (ranks,), ("pp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ranks]
    )
    stages = make_stages(schedule.num_stages, 2, width, hidden)
    inputs, targets = jax.random.normal(
        jax.random.key(1), (2, microbatches, 1, tokens, width)
    )
    piped = pipeline_value_and_grad(stage_fn, mse, schedule=schedule, mesh=mesh)
    plain = unpipelined(schedule.num_stages, microbatches)
    params = PipelineParams(stages)
    cpu_seconds(piped, params, inputs, targets)
    cpu_seconds(plain, stages, inputs, targets)
    return [
        (
            cpu_seconds(piped, params, inputs, targets),
            cpu_seconds(plain, stages, inputs, targets),
        )
        for _ in range(runs)
    ]


def compile_seconds(ranks=8, microbatches=32):
    """Wall time to trace and compile a step of P=8, M=32, two layers a stage."""
    schedule = dualpipe(ranks, microbatches)
    mesh = jax.make_mesh((ranks,), ("pp",), axis_types=(AxisType.Auto,))
    params = PipelineParams(make_stages(ranks, 2, 256, 512))
    batch = jnp.zeros((microbatches, 1, 128, 256))
    step = pipeline_value_and_grad(stage_fn, mse, schedule=schedule, mesh=mesh)
    start = time.perf_counter()
    step.lower(params, batch, batch).compile()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one schedule, one run")
    args = parser.parse_args()
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores"
    )
    print("\nlowered program / event-driven ideal (simulated)")
    for kind in KINDS:
        for ranks in (4, 8, 16):
            schedule = kind(ranks, 4 * ranks)
            program = lower(schedule)
            ratios = [
                simulate(program, costs).makespan / simulate(schedule, costs).makespan
                for costs in (Costs(), REAL)
            ]
            print(
                f"  {schedule.kind:12} P={ranks:<2} M={4 * ranks:<3} unit "
                f"{ratios[0]:.4f}  real {ratios[1]:.4f}  slots {program.num_slots}"
            )
    print(f"\ncompile time, DualPipe P=8, M=32: {compile_seconds():.1f} s")
    print(
        "\nprocess CPU time of a step / of the unpipelined step, P=4, M=8, width 1024"
    )
    for kind in KINDS[:1] if args.quick else KINDS:
        pairs = overhead(kind, 1 if args.quick else 3)
        ratio = statistics.median(piped / plain for piped, plain in pairs)
        piped, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"  {kind.__name__:12} {ratio:.3f}  ({piped:.2f} s / {plain:.2f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
