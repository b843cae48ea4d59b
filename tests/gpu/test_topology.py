"""Meshes of compile-only GPUs: what they are made of, and what is refused."""

import dataclasses
from importlib import metadata

import pytest
from jax.experimental import topologies

from dualpipe_jax import gpu_mesh
from dualpipe_jax.gpu import GPUS


def test_a_mesh_of_a_gpu_that_is_described():
    gpu = dataclasses.replace(GPUS["h100"], name="another GPU")
    mesh = gpu_mesh(gpu, {"pp": 2})
    assert {device.device_kind for device in mesh.devices} == {"another GPU"}


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
