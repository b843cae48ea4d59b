"""What sglang-jax does with a placement, restated from a description of it.

Its planner's loops are in benchmarks/sglang_jax_loops.py.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "logical_to_rank_dispatch_physical_map",
        "logical_to_all_physical_map",
        "logical_to_all_physical_map_num_valid",
        "physical_to_logical_map",
    ],
    meta_fields=["ep_dispatch_algorithm", "num_physical_experts"],
)
@dataclasses.dataclass
class ExpertLocationMetadata:
    ep_dispatch_algorithm: str
    logical_to_rank_dispatch_physical_map: jax.Array
    logical_to_all_physical_map: jax.Array
    logical_to_all_physical_map_num_valid: jax.Array
    physical_to_logical_map: jax.Array
    num_physical_experts: int


def metadata_of(physical_to_logical, num_experts, algorithm="static"):
    """The engine's arrays: each expert's replicas in the order of their places."""
    places = [
        [[s for s, e in enumerate(row) if e == expert] for expert in range(num_experts)]
        for row in physical_to_logical
    ]
    width = max(len(each) for layer in places for each in layer)
    padded = [[each + [-1] * (width - len(each)) for each in layer] for layer in places]
    everywhere = np.array(padded, np.int32)
    return ExpertLocationMetadata(
        ep_dispatch_algorithm=algorithm,
        logical_to_rank_dispatch_physical_map=jnp.asarray(everywhere[:, :, 0]),
        logical_to_all_physical_map=jnp.asarray(everywhere),
        logical_to_all_physical_map_num_valid=jnp.asarray((everywhere >= 0).sum(2)),
        physical_to_logical_map=jnp.asarray(physical_to_logical, jnp.int32),
        num_physical_experts=np.shape(physical_to_logical)[1],
    )


def read_initial_location(path):
    """What the engine finds in the file that `--init-expert-location` names."""
    path = Path(path)
    if path.suffix == ".npy":
        found = np.load(path, allow_pickle=True)
        is_dict = found.dtype == object and found.ndim == 0
        return found.item() if is_dict else {"physical_to_logical_map": found}
    return json.loads(path.read_text())


def physical_ids(topk_ids, info, layer):
    """Where the tokens of the chosen experts go, by either choice of the engine."""
    if info.ep_dispatch_algorithm == "static":
        return info.logical_to_rank_dispatch_physical_map[layer, topk_ids]
    number = info.logical_to_all_physical_map_num_valid[layer, topk_ids]
    places = info.logical_to_all_physical_map[layer, topk_ids]
    drawn = jax.random.randint(jax.random.key(0), topk_ids.shape, 0, 65536, jnp.int32)
    chosen = (drawn % number)[..., None]
    return jnp.take_along_axis(places, chosen, axis=-1)[..., 0]
