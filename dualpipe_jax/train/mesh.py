"""The mesh of a run, and its axes."""

from __future__ import annotations

import contextlib
import os

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from dualpipe_jax.processes import distributed
from dualpipe_jax.train.config import TrainConfig

# Of the mesh: both split each microbatch.
DATA_AXES = ("dp", "ep")
BATCH = PartitionSpec(None, DATA_AXES)
# Even virtual ones on a CPU take a tenth of a megabyte and a millisecond each.
MAX_DEVICES = 4096


def ask_for_devices(count: int, platform: str | None) -> None:
    """Sets jax's platform and number of CPU devices, before it initializes them.

    Args:
      count: devices of this process.
      platform: None leaves it to jax. JAX_PLATFORMS takes precedence.

    Raises:
      ValueError: there are too many for one process, or jax cannot start the platform.
    """
    if count > MAX_DEVICES:
        raise ValueError(
            f"The mesh needs {count:,} devices in this process, more than "
            f"{MAX_DEVICES:,}; use a smaller mesh, or more processes."
        )
    # As XLA's --xla_force_host_platform_device_count. Once jax has initialized its
    # devices (in a notebook, say) it refuses, and those are used.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    if platform and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", platform)
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(
            f"{platform=} of the config, JAX_PLATFORMS="
            f"{os.environ.get('JAX_PLATFORMS', '')}: {error}"
        ) from error


def check_memory(num_bytes: int, mesh: Mesh, what: str) -> None:
    """Refuses arrays that this machine cannot hold, where the CPU is the device.

    A GPU says so by itself. The system would lend a process more memory than there is,
    until it has filled it.

    Args:
      num_bytes: on all devices of this process.
      mesh: the devices.
      what: takes them.

    Raises:
      ValueError: they are more than the machine's memory.
    """
    here = set(mesh.devices.flat) & set(jax.local_devices())
    if not here or next(iter(here)).platform != "cpu" or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise ValueError(
            f"{what} takes {num_bytes / 1e9:,.0f} GB, but this machine has "
            f"{memory / 1e9:,.0f} GB of memory; use smaller sizes."
        )


def make_mesh(config: TrainConfig) -> Mesh:
    """The config's mesh over the first devices, virtual ones on a CPU.

    Raises:
      ValueError: there are too few devices, or the processes share them unevenly.
    """
    needed, processes = config.num_devices, distributed.num_processes()
    if needed % processes:
        raise ValueError(
            f"mesh={dict(config.mesh)} needs {needed} devices, which {processes} "
            "processes do not share evenly; start another number of processes."
        )
    ask_for_devices(needed // processes, config.platform)
    if jax.device_count() < needed:
        raise ValueError(
            f"mesh={dict(config.mesh)} needs {needed} devices, but jax has "
            f"{jax.device_count()} ({jax.default_backend()}); use a smaller mesh, or "
            "set JAX_PLATFORMS=cpu before jax starts to train on virtual CPU devices."
        )
    shape = config.mesh_shape
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[:needed],
    )
