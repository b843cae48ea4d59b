"""The main job's train step with one layer per stage, compiled for H100s without any.

The whole job's takes three minutes to compile; see benchmarks/results/ for its figures.
A step with wgrad residuals is in tests/executor/test_gpu_program.py.
"""

import dataclasses

import pytest

from dualpipe_jax import dualpipe, memory_report
from dualpipe_jax.gpu import gpu_compiler_options, gpu_mesh, shared_kernels
from dualpipe_jax.train import load_config, make_programs
from tests.kept import KeptLowered
from tests.modules import computations, copies_of, in_loops

# Each compiles a step for GPUs.
pytestmark = [pytest.mark.slow, pytest.mark.as_users]


@pytest.fixture(scope="module")
def options():
    """Of the step and of one of its tasks, whose kernels are mostly the same."""
    with shared_kernels() as kernels:
        yield {**gpu_compiler_options(), **kernels}


@pytest.fixture(scope="module")
def programs():
    config = load_config("tiny")
    model = config.model
    sizes = dataclasses.replace(
        model.architecture,
        num_hidden_layers=4,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
    )
    model = dataclasses.replace(model, architecture=sizes)
    config = dataclasses.replace(
        config,
        model=model,
        schedule=lambda *sizes: dualpipe(*sizes).with_whole_backwards(),
    )
    return make_programs(config, gpu_mesh("h100", config.mesh_shape))


@pytest.fixture(scope="module")
def compiled(programs, options):
    tokens = programs.abstract_tokens
    lowered = programs.train_step.lower(programs.abstract_state, tokens, tokens)
    return KeptLowered(lowered, programs.mesh).compile(options)


def test_memory_is_what_the_program_says(programs, compiled, options):
    task = programs.lower_costliest_task()
    report = memory_report(
        compiled,
        buffers=programs.buffers(),
        task=KeptLowered(task, programs.mesh).compile(options),
        arguments={"state": programs.abstract_state},
        gpu="h100",
    )
    assert 0.9 < report.ratio <= 1.1


def test_no_buffer_is_copied_in_the_loops(programs, compiled):
    """Slots and accumulators stay in place: copies are of one task's values."""
    held = programs.buffers()
    found = computations(compiled.as_text())
    copies = copies_of(found, in_loops(found))
    assert copies
    # Activations are 128 KiB and more, so all slots of one are 640 KiB.
    assert max(copies.values()) < held.num_slots * 2**17
