"""What XLA makes of exact balance for GPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from dualpipe_jax import gpu_mesh
from eplb_jax import ExpertTables, plan_microbatch


def test_the_host_decides_nothing_in_a_plan():
    """No loop and no branch, for whose condition a GPU would wait for the host."""
    here = NamedSharding(gpu_mesh("h100", {"ep": 4}), P())
    tables = ExpertTables.from_placement(jnp.arange(20) % 16, 16)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        (jnp.zeros((4, 16), jnp.int32), tables),
    )
    plan = jax.jit(functools.partial(plan_microbatch, num_fetched=2))
    text = plan.lower(*arguments).compile().as_text()
    assert "fusion(" in text
    assert "while(" not in text and "conditional(" not in text
