"""A ranking's memory, against XLA's memory analysis for a mesh of H100s."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from dualpipe_jax import Costs, StageMemory, rank_schedules
from dualpipe_jax.backward.split_backward import SplitBackward
from dualpipe_jax.executor.pipeline import PipelineParams, pipeline_value_and_grad
from dualpipe_jax.gpu.topology import gpu_compiler_options, gpu_mesh
from dualpipe_jax.schedules.generators.names import SCHEDULES
from tests.kept import KeptLowered

pytestmark = pytest.mark.as_users

RANKS, LAYERS, WIDTH, HIDDEN, TOKENS, MICROBATCHES = 4, 2, 2048, 4096, 2048, 8


def stage_fn(layers, x):
    for layer in layers:
        hidden = jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])
        x = x + hidden @ layer["down"]
    return x


def loss_fn(head, y, target):
    return jnp.mean(jnp.square(y - target).astype(jnp.float32))


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def layers(count, make):
    sizes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    return [{name: make(*size) for name, size in sizes.items()}] * count


def bf16(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


def compiled_bytes(name, function):
    """Bytes of a whole training step with its update, less the batch."""
    mesh = gpu_mesh("h100", {"pp": RANKS})
    schedule = SCHEDULES[name](RANKS, MICROBATCHES)
    stages, whole = (NamedSharding(mesh, spec) for spec in (P("pp"), P()))
    params = layers(
        LAYERS * RANKS // schedule.num_stages,
        lambda *size: bf16(schedule.num_stages, *size, sharding=stages),
    )
    batch = bf16(MICROBATCHES, 1, TOKENS, WIDTH, sharding=whole)
    value_and_grad = pipeline_value_and_grad(
        function, loss_fn, schedule=schedule, mesh=mesh
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=stages)
    def step(params, inputs, targets):
        _, grads = value_and_grad(PipelineParams(params), inputs, targets)
        return jax.tree.map(
            lambda p, g: (p.astype(g.dtype) - 0.1 * g).astype(p.dtype),
            params,
            grads.stages,
        )

    lowered = KeptLowered(step.lower(params, batch, batch), mesh)
    compiled = lowered.compile(gpu_compiler_options())
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return total - 2 * num_bytes(batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("1f1b", False),
        ("zb1p", True),
        ("dualpipe", False),
        ("dualpipe", True),
        ("dualpipev", False),
    ],
)
def test_memory_is_what_xla_allocates(name, remat):
    function = jax.checkpoint(stage_fn) if remat else stage_fn
    stage, message = layers(LAYERS, bf16), bf16(1, TOKENS, WIDTH)
    plain = SplitBackward.trace(stage_fn, stage, message)
    plan = SplitBackward.trace(function, stage, message)
    memory = StageMemory(
        residuals=num_bytes(plan.residuals),
        wgrad_residuals=num_bytes(plan.wgrad_residuals),
        parameters=num_bytes(stage),
        gradients=2 * num_bytes(stage),
        message=num_bytes(message),
    )
    (ranked,) = rank_schedules(
        RANKS, MICROBATCHES, Costs(), memory, limit=1, schedules=[name]
    ).candidates
    # Besides, as for the tick program alone (test_gpu_program.py): residuals on their
    # way from and to slots, and weight gradients of the chunks in float32.
    program = ranked.program
    chunks = len(program.chunks[0])
    workspace = 3 * num_bytes(plain.residuals) + chunks * 2 * num_bytes(stage)
    workspace *= RANKS / program.schedule.num_stages
    found = compiled_bytes(name, function)
    assert ranked.memory.total <= found <= ranked.memory.total + workspace
