"""XLA's program for a step on a mesh of H100s, compiled without having one.

Skipping is not an option: `make test` installs the plugin.
"""

import collections
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec as P

from dualpipe_jax import dualpipe, memory_report
from dualpipe_jax.executor.pipeline import PipelineParams, pipeline_value_and_grad
from dualpipe_jax.gpu import gpu_compiler_options, gpu_mesh, shared_kernels
from tests.kept import KeptLowered
from tests.modules import computations, copies_of, in_loops

pytestmark = pytest.mark.as_users

RANKS, LAYERS, WIDTH, HIDDEN, TOKENS, VOCABULARY = 4, 1, 512, 1024, 2048, 1024


def stage_fn(layers, x):
    for layer in layers:
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1) + 1e-6)
        h = x * scale[..., None].astype(x.dtype)
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return x


def loss_fn(head, y, targets):
    log_probs = jax.nn.log_softmax((y @ head).astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_probs, targets[..., None], -1))


def make_step(num_microbatches):
    mesh = gpu_mesh("h100", {"pp": RANKS})

    def struct(spec, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    layer = {
        "gate": struct(P("pp"), RANKS, WIDTH, HIDDEN),
        "up": struct(P("pp"), RANKS, WIDTH, HIDDEN),
        "down": struct(P("pp"), RANKS, HIDDEN, WIDTH),
    }
    params = PipelineParams(
        [layer] * LAYERS,
        struct(P(), VOCABULARY, WIDTH),
        struct(P(), WIDTH, VOCABULARY),
    )
    tokens = struct(P(), num_microbatches, 1, TOKENS, dtype=jnp.int32)
    step = pipeline_value_and_grad(
        stage_fn,
        loss_fn,
        schedule=dualpipe(RANKS, num_microbatches),
        mesh=mesh,
        embed_fn=lambda table, tokens: table[tokens],
    )
    return step, (params, tokens, tokens), mesh


@pytest.fixture(scope="module")
def options():
    """Of all compilations here, whose kernels are mostly the same."""
    with shared_kernels() as kernels:
        yield {**gpu_compiler_options(), **kernels}


def compile_step(num_microbatches, options):
    step, args, mesh = make_step(num_microbatches)
    return KeptLowered(step.lower(*args), mesh).compile(options)


@pytest.fixture(scope="module")
def compiled(options):
    return compile_step(16, options)


def instructions(text):
    return sum(" = " in line for lines in computations(text).values() for line in lines)


@pytest.mark.slow
def test_no_buffer_is_copied_in_the_loops(compiled):
    """No copy is larger than one message: residuals and accumulators stay in place."""
    message = 2 * TOKENS * WIDTH
    found = computations(compiled.as_text())
    names = in_loops(found)
    copies = copies_of(found, names)
    assert copies  # there are small ones, else the pattern no longer matches
    assert not {at: size for at, size in copies.items() if size > message}
    # Weight gradients are in loops, else this test reads the wrong module.
    assert any("gemm" in line for name in names for line in found[name])


@pytest.mark.slow
def test_size_does_not_depend_on_microbatches(compiled, options):
    longer = compile_step(64, options)
    short, long = (instructions(each.as_text()) for each in (compiled, longer))
    assert abs(long - short) <= 0.05 * short


@pytest.mark.slow
def test_steady_state_permutes_run_under_weight_gradients(compiled):
    """In the steady body, some GEMM of a W runs under at least half of the permutes."""
    found = computations(compiled.as_text())
    (body,) = (
        found[name]
        for name in in_loops(found)
        if sum("collective-permute-start(" in line for line in found[name]) > 1
    )
    under, flying = collections.Counter(), set()
    for line in body:
        start = re.search(r"%(\S+) = .* collective-permute-start\(", line)
        done = re.search(r"collective-permute-done\(.*%([\w.-]+)\)", line)
        if start:
            flying.add(start[1])
            under[start[1]] = 0
        elif done:
            flying.remove(done[1])
        elif "gemm" in line and "/transpose(" in line:
            under.update(flying)
    assert sum(count > 0 for count in under.values()) >= len(under) / 2


@pytest.mark.slow
def test_memory_is_what_the_program_says(compiled, options):
    """Temporary memory is the buffers and one pair's working set, compiled alone."""
    step, args, mesh = make_step(16)
    task = KeptLowered(step.lower_costliest_task(*args), mesh).compile(options)
    report = memory_report(compiled, buffers=step.buffers(*args), task=task)
    # The loss runs when no pair does, and its memory is mostly logits.
    assert 0.9 < report.ratio <= 1.1


@pytest.mark.slow
def test_offloaded_residuals_are_slots_in_the_hosts_memory(options):
    """CPUs have one memory, so only XLA for GPUs says where a buffer lies."""
    mesh, shape = gpu_mesh("h100", {"pp": 2}), (256, 128)

    def stage(weights, x):
        hidden = checkpoint_name(jnp.sin(x @ weights), "hidden")
        return x + hidden @ weights

    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["hidden"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    step = pipeline_value_and_grad(
        jax.checkpoint(stage, policy=policy),
        lambda head, y, target: jnp.mean((y - target) ** 2),
        schedule=dualpipe(2, 8),
        mesh=mesh,
    )

    def struct(spec, *shape):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    x = struct(P(), 8, *shape)
    args = PipelineParams(struct(P("pp"), 2, shape[1], shape[1])), x, x
    compiled = KeptLowered(step.lower(*args), mesh).compile(options)
    slots = step.buffers(*args).num_slots
    memory = compiled.memory_analysis()
    assert memory.host_temp_size_in_bytes == 4 * slots * math.prod(shape)
    # No slot is copied to another place in the host's memory.
    at_host = re.findall(r"\[([\d,]+)\]\S*S\(5\)\S* (\S+)\(", compiled.as_text())
    ways = {name for _, name in at_host}
    assert "dynamic-update-slice" in ways
    assert not ways & {"copy", "copy-start", "dynamic-slice", "broadcast"}
