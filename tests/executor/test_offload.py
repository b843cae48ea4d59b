"""What a remat policy keeps in the host's memory stays there in the slots."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dualpipe_jax import PipelineParams, dualpipe
from dualpipe_jax.executor.pipeline import pipeline_value_and_grad
from tests.executor.toy import make_mesh

WIDTH, MICROBATCH, LAYERS = 8, 4, 3
POLICIES = jax.checkpoint_policies


def layer(w, x):
    return x + checkpoint_name(jnp.sin(x @ w), "hidden") @ w


def unrolled(ws, x):
    for w in ws:
        x = layer(w, x)
    return x


def scanned(ws, x):
    return lax.scan(lambda x, w: (layer(w, x), None), x, ws)[0]


def build(stage, policy, schedule, overlap):
    return pipeline_value_and_grad(
        jax.checkpoint(stage, policy=policy),
        lambda head, y, target: jnp.mean((y - target) ** 2),
        schedule=schedule,
        mesh=make_mesh(pp=2),
        overlap=overlap,
    )


OFFLOAD = POLICIES.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["hidden"],
    offload_src="device",
    offload_dst="pinned_host",
)
KEEP = POLICIES.save_only_these_names("hidden")


@pytest.mark.parametrize(
    ("stage", "overlap"), [(unrolled, True), (scanned, False)], ids=["overlap", "scan"]
)
def test_residuals_in_host_memory(stage, overlap):
    schedule = dualpipe(2, 4)
    steps = [build(stage, policy, schedule, overlap) for policy in (OFFLOAD, KEEP)]
    key = jax.random.key(0)
    params = PipelineParams(0.3 * jax.random.normal(key, (2, LAYERS, WIDTH, WIDTH)))
    x = jax.random.normal(key, (schedule.num_microbatches, MICROBATCH, WIDTH))
    results = [step(params, x, x) for step in steps]
    jax.tree.map(np.testing.assert_array_equal, *results)
    offloaded, kept = (step.buffers(params, x, x) for step in steps)
    hidden = kept.num_slots * LAYERS * MICROBATCH * WIDTH * 4
    assert kept.residuals - offloaded.residuals == hidden
    # W fetches again what I has fetched.
    assert offloaded.wgrad_residuals <= kept.wgrad_residuals
    # CPUs have one memory: only the types say where a buffer lies.
    buffer = rf"f32<host>\[{kept.num_slots}(,{LAYERS})?,{MICROBATCH},{WIDTH}\]"
    assert re.search(buffer, str(steps[0].trace(params, x, x).jaxpr))
    steps[0].lower_costliest_task(params, x, x)
