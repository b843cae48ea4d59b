"""What depends on the devices: matrices that are divided over `ep`, and kernels."""

from __future__ import annotations

import contextlib

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from eplb_jax.products import cross_compiling


def kernels_for(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager:
    """Uses GPU kernels also on meshes that are only compiled for."""
    if isinstance(mesh, Mesh) and mesh.devices.flat[0].platform != "cpu":
        return cross_compiling()
    return contextlib.nullcontext()


def gather_matrix(leaf: jax.Array, axis: int, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Gathers a matrix, of which each device of `ep` holds a part at rest."""
    if mesh.shape["ep"] == 1:
        return leaf
    return lax.all_gather(leaf, "ep", axis=axis, tiled=True)


def look_up(
    embed: jax.Array, tokens: jax.Array, mesh: Mesh | AbstractMesh
) -> jax.Array:
    """Returns embeddings [batch, sequence, D] from a matrix divided by columns.

    Tokens travel to the columns instead of columns to the tokens: a microbatch's
    embeddings are fewer bytes than the matrix.
    """
    if mesh.shape["ep"] == 1:
        return embed[tokens]
    of_all = lax.all_gather(tokens, "ep")
    columns = embed[of_all]
    whole = lax.all_to_all(columns, "ep", split_axis=0, concat_axis=3, tiled=True)
    return whole[0]
