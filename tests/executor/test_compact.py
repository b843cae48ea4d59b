"""The program without overlap: its size, where it is the default, its tasks."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dualpipe_jax import dualpipe, gpu_mesh, lower, one_f_one_b, zb1p
from dualpipe_jax.executor.compact import tasks_of
from dualpipe_jax.executor.pipeline import pipeline_forward, pipeline_value_and_grad
from tests.executor.toy import (
    SCHEDULES,
    embed_fn,
    loss_fn,
    make_batch,
    make_mesh,
    make_params,
    stage_fn,
)


def deep_stage(params, x):
    for _ in range(8):
        x = stage_fn(params, x)
    return x


def lowered(schedule, overlap, mesh=None, stage_fn=stage_fn):
    """Returns the step's StableHLO, without compiling it."""
    mesh = mesh or make_mesh(pp=schedule.num_ranks)
    step = pipeline_value_and_grad(
        stage_fn,
        loss_fn,
        schedule=schedule,
        mesh=mesh,
        embed_fn=embed_fn,
        overlap=overlap,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        (make_params(schedule.num_stages), *make_batch(schedule.num_microbatches)),
    )
    return step.lower(*args).as_text()


def instructions(text):
    return text.count(" = ")


@pytest.mark.parametrize("num_microbatches", [8, 24])
def test_a_third_of_the_overlapped_program(num_microbatches):
    schedule = dualpipe(4, num_microbatches)
    compact, overlapped = (
        instructions(lowered(schedule, overlap, stage_fn=deep_stage))
        for overlap in (False, True)
    )
    assert compact < overlapped / 3


def test_size_does_not_depend_on_microbatches():
    short, long = (
        instructions(lowered(dualpipe(4, num_microbatches), False))
        for num_microbatches in (8, 64)
    )
    # The ramps of a longer program have other permutes.
    assert abs(long - short) <= 0.05 * short


@pytest.mark.parametrize("schedule", [one_f_one_b(4, 8), zb1p(4, 8), dualpipe(4, 8)])
def test_one_body_for_both_chunks_and_all_kinds_of_backward(schedule):
    """The activation function is computed in F only: its output is kept for B."""
    assert lowered(schedule, False).count("stablehlo.tanh") == 1


def test_overlap_is_the_default_where_communication_can_be_hidden():
    schedule = dualpipe(2, 4)
    on_cpus = [lowered(schedule, overlap) for overlap in (None, False, True)]
    assert on_cpus[0] == on_cpus[1] != on_cpus[2]
    mesh = gpu_mesh("h100", {"pp": 2})
    on_gpus = [lowered(schedule, overlap, mesh) for overlap in (None, True, False)]
    assert on_gpus[0] == on_gpus[1] != on_gpus[2]


def test_a_forward_pass_has_one_body_too():
    schedule = dualpipe(2, 4)
    forward = pipeline_forward(
        stage_fn, schedule=schedule, mesh=make_mesh(pp=2), embed_fn=embed_fn
    )
    tokens, _ = make_batch(schedule.num_microbatches)
    assert forward.lower(make_params(2), tokens).as_text().count("stablehlo.tanh") == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_stage_runs_each_microbatch_forward_and_backward_once(name):
    program = lower(SCHEDULES[name])
    schedule, variants = program.schedule, tuple(range(program.schedule.num_stages))
    tasks = tasks_of(program, variants)
    once = [
        (stage, microbatch)
        for stage in variants
        for microbatch in range(schedule.num_microbatches)
    ]
    for runs, stage, microbatch in (
        (tasks.forward, tasks.f_variant, program.table.f_microbatch),
        (tasks.backward, tasks.b_variant, program.table.b_microbatch),
    ):
        where = np.nonzero(runs)
        pairs = zip(stage[where].tolist(), microbatch[where].tolist(), strict=True)
        assert sorted(pairs) == once
