"""The mesh of a server."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

from dualpipe_jax.deepseek.serve.config import ServeConfig
from dualpipe_jax.train import ask_for_devices, check_memory


def make_serve_mesh(config: ServeConfig) -> Mesh:
    """Makes a mesh with the axis `ep` of the first devices, virtual ones on a CPU.

    Raises:
      ValueError: there are too few devices, or too little memory for the cache.
    """
    ask_for_devices(config.num_devices, config.platform)
    devices = jax.devices()
    if len(devices) < config.num_devices:
        raise ValueError(
            f"num_devices={config.num_devices}, but jax has {len(devices)} "
            f"({jax.default_backend()}); serve with fewer, or set JAX_PLATFORMS=cpu "
            "before jax starts to serve on virtual CPU devices."
        )
    mesh = jax.make_mesh(
        (config.num_devices,),
        ("ep",),
        axis_types=(AxisType.Auto,),
        devices=devices[: config.num_devices],
    )
    num_here = len(set(mesh.devices.flat) & set(jax.local_devices()))
    check_memory(config.cache_bytes * num_here, mesh, "The cache of all requests")
    return mesh
