"""Programs for GPUs are kept as they were compiled, and apart from all others."""

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax import compat
from dualpipe_jax.gpu import gpu_compiler_options, gpu_mesh
from tests.kept import KeptLowered


@pytest.fixture
def folder(tmp_path):
    with compat.cache_settings({"jax_compilation_cache_dir": str(tmp_path)}):
        yield tmp_path


MESH = {"ep": 2}


def lower(*, line=0, scope="a", mesh=MESH):
    """A sum over devices, from this line of a file, under this name."""
    source = "def total(x):\n  with jax.named_scope(scope):\n    return x.sum(axis=0)"
    names = {"jax": jax, "scope": scope}
    exec(compile("\n" * line + source, f"file{line}.py", "exec"), names)
    mesh = gpu_mesh("h100", mesh, gpus_per_host=2)
    split = jax.NamedSharding(mesh, jax.P("ep"))
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=split)
    return jax.jit(names["total"]).lower(x), mesh


class NeverCompiled:
    def __init__(self, lowered):
        self.as_text = lowered.as_text


def test_what_is_kept_is_what_was_compiled(folder):
    lowered, mesh = lower()
    options = gpu_compiler_options()
    KeptLowered(lowered, mesh).compile(options)
    moved, _ = lower(line=7)  # the same program
    kept = KeptLowered(NeverCompiled(moved), mesh).compile(options)
    compiled = lowered.compile(options)
    assert kept.as_text() == compiled.as_text()
    memory = compiled.memory_analysis()
    assert kept.memory_analysis().argument_size_in_bytes == 4 * 8 * 4 / 2
    for name, value in vars(kept.memory_analysis()).items():
        assert value == getattr(memory, name)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"scope": "b"}, {}),
        ({"mesh": {"ep": 4}}, {}),
        ({}, {"xla_gpu_enable_latency_hiding_scheduler": False}),
    ],
    ids=["a name", "a mesh", "an option"],
)
def test_another_program_is_compiled(folder, change, option):
    options = gpu_compiler_options()
    KeptLowered(*lower()).compile(options)
    lowered, mesh = lower(**change)
    other = KeptLowered(NeverCompiled(lowered), mesh)
    with pytest.raises(AttributeError, match="compile"):
        other.compile({**options, **option})


def test_without_a_folder_nothing_is_kept():
    with compat.cache_settings({"jax_compilation_cache_dir": ""}):
        lowered, mesh = lower()
        kept = KeptLowered(lowered, mesh)
        assert "all-reduce" in kept.compile().as_text()
