"""A server's weights: initial ones, those of a training run, or published ones.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from dualpipe_jax.deepseek.model import (
    DeepSeek,
    DeepSeekPipeline,
    Head,
    RouterState,
    initial_layer,
    map_with_names,
    parameters,
    restore_run,
)
from dualpipe_jax.deepseek.pretrained import (
    check_same,
    open_folder,
    read_bias,
    read_params,
)
from dualpipe_jax.deepseek.serve.arrays import PARAM_SPECS, ServeParams
from dualpipe_jax.deepseek.serve.config import ServeConfig
from dualpipe_jax.deepseek.serve.mesh import make_serve_mesh
from dualpipe_jax.executor import PipelineParams
from eplb_jax import ExpertWeights, rebalance_experts
from eplb_jax.layer import ONE_DEVICE
from eplb_jax.placement import take_or_zero
from eplb_jax.products import ScaledWeight

P = PartitionSpec
PyTree = Any


def initial_params(config: ServeConfig, seed: int = 0) -> ServeParams:
    """Returns initial weights, of a model that was never trained.

    Args:
      config: of the server.
      seed: of the random numbers.

    Returns:
      `ServeParams`; physical expert i has the weights of expert i modulo their number.
    """
    arch = config.architecture
    *keys, embed_key, head_key = jax.random.split(
        jax.random.key(seed), arch.num_hidden_layers + 2
    )
    layers = []
    for layer, key in enumerate(keys):
        is_dense = arch.is_dense(layer)
        tree = initial_layer(
            arch, ONE_DEVICE, key, has_dense=is_dense, has_moe=not is_dense
        )
        layers.append(tree)
        if not is_dense and arch.has_router_bias:
            layers[-1]["moe"]["bias"] = jnp.zeros(arch.n_routed_experts, jnp.float32)
    embed = (
        jax.random.normal(embed_key, (arch.vocab_size, arch.hidden_size))
        * arch.initializer_range
    )
    return _placed(config, embed, parameters(Head(arch, head_key)), layers)


def trained_params(
    config: ServeConfig,
    model: DeepSeekPipeline,
    params: PipelineParams,
    bias: Any,
    placement: ArrayLike | None = None,
) -> ServeParams:
    """Returns trained weights, without the multi-token prediction module.

    Args:
      config: of the server.
      model: the model that the parameters are laid out for.
      params: of a `TrainState`.
      bias: [MoE layers, experts] float32, of its buffers.
      placement: see `Engine`.
    """
    arch, layers = config.architecture, []
    for layer in range(arch.num_hidden_layers):
        stage, position = model.layout.place[layer]
        tree = jax.tree.map(lambda leaf, at=stage: leaf[at], params.stages[position])
        other = "moe" if arch.is_dense(layer) else "dense"
        tree = {name: part for name, part in tree.items() if name != other}
        if not arch.is_dense(layer) and arch.has_router_bias:
            own = bias[layer - arch.first_k_dense_replace]
            tree["moe"] = tree["moe"] | {"bias": own}
        layers.append(tree)
    head = {name: part for name, part in params.head.items() if name != "mtp"}
    return _placed(config, params.embed, head, layers, placement)


def load_checkpoint(
    config: ServeConfig,
    folder: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    say: Callable[[str], Any] = print,
    is_placed: bool = False,
) -> tuple[ServeParams, np.ndarray | None]:
    """Loads the latest checkpoint of a training run, for `Engine`.

    The optimizer's state is not read.

    Args:
      config: of the server.
      folder: the run's folder.
      mesh: where the weights go, with the axis `ep`; by default the first devices.
      say: called with a line of text for each damaged checkpoint.
      is_placed: whether `params` are by the returned placement, which `Engine` must
        then be told; False: physical expert i is expert i modulo their number.

    Returns:
      params: for `Engine`.
      placement: [layers, physical experts] int32 for the load observed in training, for
        `Engine` or `Engine.place`; None if training observed none.

    Raises:
      ValueError: there is no checkpoint, none can be read, or it is of another model.
    """
    mesh = make_serve_mesh(config) if mesh is None else mesh
    arch = config.architecture
    single = DeepSeek(architecture=arch).build_unpipelined()
    model, state = restore_run(
        folder, single.from_checkpoint_info, lambda leaf: _divided(leaf, mesh), say
    )
    make = functools.partial(_of_a_server, config, model, is_placed)
    weights = ServeParams(*(NamedSharding(mesh, spec) for spec in PARAM_SPECS))
    out_shardings = weights, NamedSharding(mesh, P())
    params, placement = jax.jit(make, out_shardings=out_shardings)(state)
    has_loads = float(state["buffers"]["loads"].weight) > 0
    return params, np.asarray(placement) if has_loads else None


def load_published(
    config: ServeConfig,
    folder: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
) -> ServeParams:
    """Loads the weights of a published model, for `Engine`.

    A process reads only its share.

    Args:
      config: of the server; its architecture is `DeepSeekConfig.from_pretrained` of the
        folder.
      folder: see `load_pretrained`.
      mesh: where the weights go, with the axis `ep`; by default the first devices.

    Returns:
      `ServeParams`; physical expert i has the weights of expert i modulo their number.

    Raises:
      ValueError: see `load_pretrained`, or the folder has another model.
    """
    mesh = make_serve_mesh(config) if mesh is None else mesh
    published, source = open_folder(folder)
    check_same(config.architecture, published, folder)
    # The multi-token prediction module is not served, nor read.
    arch = dataclasses.replace(published, num_nextn_predict_layers=0)
    model = DeepSeek(architecture=arch).build_unpipelined()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    shardings = jax.tree.map(lambda leaf: _divided(leaf, mesh).sharding, shapes)
    # In float32 the product of a published float8 weight and its scale is exact, so
    # that quantizing it again gives the same values.
    dtype = "float32" if config.products == "fp8" else config.compute_dtype
    params = read_params(source, model, shardings, dtype)
    bias = read_bias(source, model)
    weights = ServeParams(*(NamedSharding(mesh, spec) for spec in PARAM_SPECS))
    make = functools.partial(trained_params, config, model)
    return jax.jit(make, out_shardings=weights)(params, bias)


def _of_a_server(
    config: ServeConfig, model: DeepSeekPipeline, is_placed: bool, state: dict[str, Any]
) -> tuple[ServeParams, jax.Array]:
    """Returns what `load_checkpoint` does; without loads, experts are in order."""
    arch, buffers = config.architecture, RouterState(**state["buffers"])
    planned = rebalance_experts(
        model.balancer.estimate(buffers)[: arch.num_moe_layers],
        config.num_physical_experts,
        arch.n_group,
        config.num_nodes,
        config.num_devices,
    )
    placement = jnp.where(
        buffers.loads.weight > 0,
        planned.physical_to_logical_map,
        config.placement_in_order,
    )
    by = placement if is_placed else None
    return trained_params(config, model, state["params"], buffers.bias, by), placement


def _divided(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Divides a leaf along the largest axis that the number of devices divides."""
    fits = [at for at, size in enumerate(leaf.shape) if size % mesh.size == 0]
    axes: list[str | None] = [None] * len(leaf.shape)
    if fits:
        axes[max(fits, key=lambda at: leaf.shape[at])] = "ep"
    sharding = NamedSharding(mesh, P(*axes))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(
    config: ServeConfig,
    embed: jax.Array,
    head: PyTree,
    layers: list[PyTree],
    placement: ArrayLike | None = None,
) -> ServeParams:
    """Gathers physical experts, and casts weights to the dtype that they compute in."""
    if placement is None:
        placement = config.placement_in_order
    placement_LX = jnp.asarray(placement, jnp.int32)
    rest, experts = [], []
    for tree in layers:
        if "moe" in tree:
            logical = tree["moe"]["experts"]
            moe = {name: v for name, v in tree["moe"].items() if name != "experts"}
            tree = tree | {"moe": moe}
            expert_X = placement_LX[len(experts)]
            physical = [
                take_or_zero(logical[name], expert_X) for name in ExpertWeights._fields
            ]
            experts.append(ExpertWeights(*physical))
        rest.append(tree)

    def prepare(names: tuple[str, ...], leaf: jax.Array) -> Any:
        if config.products == "fp8" and _is_matrix(names):
            # Of a matrix: the axes of its input, then those of its result.
            num_in = leaf.ndim - 1 if "out" in names else 1
            size = math.prod(leaf.shape[:num_in])
            if "attention" in names:
                leaf = leaf.reshape(size, leaf.size // size)
            return ScaledWeight.of(leaf)
        is_router = {"router", "bias"} & set(names)
        return leaf if is_router else leaf.astype(config.compute_dtype)

    named = {"embed": embed, "head": head, "layers": rest, "experts": experts}
    return ServeParams(**map_with_names(prepare, named))


def _is_matrix(names: tuple[str, ...]) -> bool:
    """Whether a parameter of a server is multiplied in float8, if anything is."""
    kinds = {"experts", "shared", "dense"}
    return bool(kinds & set(names)) or ("attention" in names and "kernel" in names)
