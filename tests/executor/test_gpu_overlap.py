"""Guards the overlap in the steady state, compiled for GPUs.

Layers with two exchanges over `ep` each, as in a mixture of experts, at widths at which
compute takes longer than communication. With one layer per stage there is the least
compute to hide its messages.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from dualpipe_jax import dualpipe, gpu_mesh
from dualpipe_jax.executor.pipeline import PipelineParams, pipeline_value_and_grad
from dualpipe_jax.gpu.overlap import compile_overlapped, overlap_report
from tests.kept import KeptLowered

# Each compiles a step for GPUs twice, if none is kept.
pytestmark = [pytest.mark.slow, pytest.mark.as_users]

WIDTH, HIDDEN, TOKENS = 4096, 16384, 8192


def exchange(x):
    return lax.all_to_all(x, "ep", split_axis=0, concat_axis=0, tiled=True)


def stage_fn(layers, x):
    for layer in layers:
        x = x + jax.nn.silu(x @ layer["a"]) @ layer["b"]
        x = x + exchange(jax.nn.silu(exchange(x) @ layer["c"]) @ layer["d"])
    return x


def loss_fn(head, y, targets):
    return jnp.mean(jnp.square((y @ head).astype(jnp.float32) - targets))


def lowered_step(schedule, num_devices, num_layers, stage_fn=stage_fn):
    num_ranks = schedule.num_ranks
    mesh = gpu_mesh("h100", {"pp": num_ranks, "ep": num_devices})

    def struct(spec, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    up = struct(P("pp"), num_ranks, WIDTH, HIDDEN)
    down = struct(P("pp"), num_ranks, HIDDEN, WIDTH)
    params = PipelineParams(
        [{"a": up, "b": down, "c": up, "d": down}] * num_layers,
        None,
        struct(P(), WIDTH, 8),
    )
    data = P(None, "ep")
    rows = (schedule.num_microbatches, num_devices * TOKENS)
    step = pipeline_value_and_grad(
        stage_fn, loss_fn, schedule=schedule, mesh=mesh, data_axes=("ep",)
    )
    lowered = step.lower(
        params,
        struct(data, *rows, WIDTH),
        struct(data, *rows, 8, dtype=jnp.float32),
    )
    return KeptLowered(lowered, mesh)


@pytest.mark.parametrize(
    ("num_ranks", "num_devices", "num_layers"), [(2, 4, 2), (4, 8, 1)]
)
def test_communication_runs_under_compute(num_ranks, num_devices, num_layers):
    # One node has four GPUs here, so that exchanges over ep=8 use the network.
    schedule = dualpipe(num_ranks, 4 * num_ranks)
    lowered = lowered_step(schedule, num_devices, num_layers)
    compiled = compile_overlapped(lowered, gpus_per_node=4)
    report = overlap_report(compiled, gpu="h100", gpus_per_node=4)
    steady = report.steady_state
    kinds = [each.kind for each in steady.collectives]
    # F_A&B_B and F_B&B_A: two exchanges per layer and direction, and two messages.
    assert kinds.count("all-to-all") == 2 * 2 * 2 * num_layers
    # With two ranks, every other tick's messages stay on their rank.
    assert kinds.count("collective-permute") == min(4, num_ranks)
    assert steady.hidden_fraction >= 0.97
    assert not steady.without_gemms
    assert steady.compute.seconds > steady.communication_s  # else not all is hidden


def test_stages_with_functions_of_their_own_hide_it_too():
    """Pairs of inner and outer ranks are inside guards, and nothing in branches."""

    def other_fn(layers, x):
        return stage_fn(layers, x)

    schedule = dualpipe(4, 16).with_whole_backwards()
    stage_fns = [stage_fn, other_fn, other_fn, stage_fn]
    compiled = compile_overlapped(lowered_step(schedule, 2, 1, stage_fns))
    report = overlap_report(compiled, gpu="h100")
    steady = report.steady_state
    assert steady.kind == "guard"
    kinds = [each.kind for each in steady.collectives]
    assert kinds == ["all-to-all"] * 2 * 2
    assert steady.hidden_fraction >= 0.97
    assert not steady.without_gemms
