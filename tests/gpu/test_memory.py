"""The memory report: bytes by hand, refusals, and its text."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax import (
    PipelineParams,
    dualpipe,
    gpipe,
    lower,
    memory_report,
    pipeline_value_and_grad,
)
from dualpipe_jax.executor import BufferBytes
from dualpipe_jax.gpu import MemoryReport

RANKS, MICROBATCHES, ROWS, WIDTH = 2, 4, 8, 64


def step_of(schedule, overlap=None):
    return pipeline_value_and_grad(
        lambda w, x: jnp.tanh(x @ w),
        lambda head, y, target: jnp.mean((y @ head - target) ** 2),
        schedule=schedule,
        mesh=jax.make_mesh((RANKS,), ("pp",), devices=jax.devices()[:RANKS]),
        overlap=overlap,
    )


def arguments():
    x = jax.ShapeDtypeStruct((MICROBATCHES, ROWS, WIDTH), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((RANKS, WIDTH, WIDTH), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    return PipelineParams(weights, None, head), x, x


@pytest.mark.parametrize("overlap", [True, False])
def test_buffers_are_counted_as_the_program_plans_them(overlap):
    schedule = dualpipe(RANKS, MICROBATCHES)
    program = lower(schedule)
    found = step_of(schedule, overlap).buffers(*arguments())
    activation, weights = 2 * ROWS * WIDTH, 2 * WIDTH * WIDTH
    # A whole backward keeps nothing for W.
    assert (found.num_slots, found.num_wgrad_residual_slots) == (
        RANKS + 1,
        int(overlap),
    )
    # x for the weights' gradient, y for tanh's derivative.
    assert found.residuals == found.num_slots * 2 * activation
    # The product's cotangent, which W needs beside x.
    assert found.wgrad_residuals == found.num_wgrad_residual_slots * activation
    assert found.messages == (program.num_message_slots + 1) * activation
    # Two stages a rank and the head; gradients in float32.
    assert found.parameters == 3 * weights
    assert found.gradients == 2 * found.parameters
    assert found.outputs == 4 * MICROBATCHES


def test_a_schedule_of_whole_backwards_has_no_wgrad_residuals():
    found = step_of(gpipe(RANKS, MICROBATCHES)).buffers(*arguments())
    assert found.wgrad_residuals == found.num_wgrad_residual_slots == 0
    assert found.num_slots == MICROBATCHES


def compiled_like(temporaries, given=64, results=24, in_place=16):
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=given,
        output_size_in_bytes=results,
        alias_size_in_bytes=in_place,
        temp_size_in_bytes=temporaries,
        generated_code_size_in_bytes=0,
    )
    return types.SimpleNamespace(memory_analysis=lambda: analysis)


BUFFERS = BufferBytes(400, 5, 90, 3, 20, 80, 40, 10)


def test_temporaries_against_buffers_and_a_task():
    report = memory_report(
        compiled_like(880),
        buffers=BUFFERS,
        task=compiled_like(160),
        arguments={"parameters": jax.ShapeDtypeStruct((12,), jnp.float32)},
        gpu="h100",
    )
    assert report.arguments == {"parameters": 48, "other": 16}
    assert report.outputs == 8  # of 24 bytes, 16 take an argument's place
    assert report.expected == 640 + 160 and report.ratio == 1.1
    assert report.total == 64 + 8 + 880
    read = json.loads(report.to_json())
    assert read["ratio"] == 1.1 and read["buffers"]["residuals"] == 400
    text = str(report)
    assert "1.10 x" in text and "5 slots" in text and "to spare" in text
    assert text in report._repr_html_()


def test_one_device_s_shards_are_counted():
    mesh = jax.make_mesh((RANKS,), ("pp",), devices=jax.devices()[:RANKS])
    divided = jax.NamedSharding(mesh, jax.P("pp"))
    leaf = jax.ShapeDtypeStruct((RANKS, 8), jnp.float32, sharding=divided)
    report = memory_report(compiled_like(0), arguments={"state": {"a": leaf}})
    assert report.arguments == {"state": 32, "other": 32}
    assert report.expected is report.ratio is report.spare is None


def test_a_step_that_does_not_fit():
    report = MemoryReport({"parameters": 2**30}, 0, 3 * 2**30, 0, capacity=3 * 2**30)
    assert report.spare == -(2**30)
    assert "1.0 GiB too much" in str(report) and "too much" in repr(report)


def test_refusals():
    leaf = jax.ShapeDtypeStruct((17,), jnp.float32)
    with pytest.raises(ValueError, match=r"arguments take 68 B .* 64 B"):
        memory_report(compiled_like(0), arguments={"parameters": leaf})
    with pytest.raises(ValueError, match=r"gpu='gtx' is unknown; choose from h100, "):
        memory_report(compiled_like(0), gpu="gtx")
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    with pytest.raises(ValueError, match="no memory analysis; compile for GPUs"):
        memory_report(silent)


def test_wrong_parameters_are_refused_as_by_the_step():
    step = step_of(dualpipe(RANKS, MICROBATCHES))
    with pytest.raises(ValueError, match="params is a dict"):
        step.buffers({}, *arguments()[1:])
    with pytest.raises(ValueError, match="params is a dict"):
        step.lower_costliest_task({}, *arguments()[1:])
