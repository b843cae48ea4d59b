"""What a stage keeps for its backward pass when layers are recomputed."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax.backward.split_backward import SplitBackward
from dualpipe_jax.deepseek import DeepSeek
from tests.deepseek.model.sizes import small

BATCH, LENGTH, LAYERS = 2, 8, 2
ARCHITECTURE = dataclasses.replace(
    small(), num_hidden_layers=LAYERS, first_k_dense_replace=0
)


def trace(remat):
    """The plan of a stage of two MoE layers."""
    model = DeepSeek(architecture=ARCHITECTURE, remat=remat).build_unpipelined()

    def stage_of(key):
        prepared = model.prepare_params(model.init(key), model.init_buffers())
        return jax.tree.map(lambda leaf: leaf[0], prepared.stages)

    params = jax.eval_shape(stage_of, jax.random.key(0))
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, ARCHITECTURE.hidden_size), jnp.float32)
    return SplitBackward.trace(model.stage, params, x, has_aux=True)


@pytest.mark.slow
def test_what_is_kept():
    plans = {
        remat: trace(remat)
        for remat in ((), ("attention",), ("experts",), ("attention", "experts"))
    }
    kept = {
        remat: sum(leaf.size for leaf in plan.residuals)
        for remat, plan in plans.items()
    }
    both = ("attention", "experts")
    assert kept[both] < min(kept["attention",], kept["experts",]) < kept[()]
    # Of a layer, its input and the rows that came to the experts: not what lies
    # between attention and experts, nor what is inside the shared one.
    dim, rows = (
        ARCHITECTURE.hidden_size,
        BATCH * LENGTH * ARCHITECTURE.num_experts_per_tok,
    )
    wide = [leaf.shape for leaf in plans[both].residuals if leaf.size >= rows * 4]
    assert sorted(wide) == LAYERS * [(BATCH, LENGTH, dim)] + LAYERS * [(rows, dim)]
