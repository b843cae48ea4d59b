"""What `overlap` and `memory` share: a config, and the GPUs to compile its step for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from jax.sharding import Mesh

from dualpipe_jax.gpu import GPUS, gpu_mesh

if TYPE_CHECKING:
    from dualpipe_jax.train import StepConfig

Config = TypeVar("Config", bound="StepConfig")


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """Adds `--gpu`."""
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), default="h100", help="(%(default)s)"
    )


def load_for_gpus(
    kind: type[Config], name: str, gpu: str, *, gpus_per_node: int = 8
) -> tuple[Config, Mesh]:
    """Loads a config, and makes its mesh of compile-only GPUs.

    Args:
      kind: what the config must be.
      name: as for `train`.
      gpu: a key of `GPUS`.
      gpus_per_node: GPUs per node.

    Raises:
      ValueError: there is no such config, or its mesh would fill a node only in part.
    """
    from dualpipe_jax.train import load_as  # `overlap` reads modules without it

    config = load_as(kind, name)
    return config, gpu_mesh(gpu, config.mesh_shape, gpus_per_host=gpus_per_node)
