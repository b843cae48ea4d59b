"""Meshes of compile-only GPUs: what they are made of, and what is refused."""

import dataclasses
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from dualpipe_jax import gpu_mesh
from dualpipe_jax.gpu import GPUS, gpu_compiler_options, shared_kernels


def test_a_mesh_of_a_gpu_that_is_described():
    gpu = dataclasses.replace(GPUS["h100"], name="another GPU")
    mesh = gpu_mesh(gpu, {"pp": 2})
    assert {device.device_kind for device in mesh.devices} == {"another GPU"}


@pytest.fixture
def cache_folder(tmp_path):
    """The folder of a compilation cache of this test's own, which keeps everything."""
    ours = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in ours}

    def configure(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    configure(ours)
    yield tmp_path
    configure(before)


def test_compilations_that_share_kernels_make_the_same_programs(cache_folder):
    mesh = gpu_mesh("h100", {"ep": 2})
    halves = jax.NamedSharding(mesh, jax.P("ep"))
    x = jax.ShapeDtypeStruct((4, 8), "float32", sharding=halves)
    lowered = [jax.jit(lambda x: jnp.tanh(x.sum(axis=0))).lower(x) for _ in range(3)]
    with shared_kernels() as kernels:
        options = {**gpu_compiler_options(), **kernels}
        texts = [each.compile(options).as_text() for each in lowered[1:]]
        file = Path(kernels["xla_gpu_kernel_cache_file"])
        assert file.stat().st_size
    assert not file.exists()
    # The cache could not load them; afterwards it is used again.
    assert not list(cache_folder.iterdir())
    texts.append(lowered[0].compile(gpu_compiler_options()).as_text())
    assert len(set(texts)) == 1
    assert list(cache_folder.iterdir())


@pytest.mark.parametrize(
    ("gpu", "axes", "message"),
    [
        ("h1000", {"pp": 2}, r"gpu='h1000' is unknown; choose from h100, "),
        ("h100", {}, r"axes=\{\} must name at least one axis"),
        ("h100", {"pp": 0}, r"axes=\{'pp': 0\} must name .* of size 1 or more"),
        (
            "h100",
            {"pp": 3, "ep": 3},
            r"has 9 GPUs, which is not a multiple of gpus_per",
        ),
    ],
)
def test_meshes_that_are_refused(gpu, axes, message):
    with pytest.raises(ValueError, match=message):
        gpu_mesh(gpu, axes)


@pytest.mark.parametrize(
    ("installed", "named"),
    [({}, "none"), ({"jax-cuda12-pjrt": "0.4.1"}, "jax-cuda12-pjrt 0.4.1")],
)
def test_a_plugin_that_is_missing_or_of_another_version(monkeypatch, installed, named):
    def refuse(**_):
        raise RuntimeError("Unknown backend cuda")

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ValueError, match=r"pip install 'dualpipe-jax\[gpu-aot\]'") as e:
        gpu_mesh("h100", {"pp": 2})
    assert f"(installed: {named})" in str(e.value)
    assert "Unknown backend cuda" in str(e.value)
