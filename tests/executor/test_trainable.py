"""Frozen parameters: what is selected, and that nothing is computed for the rest."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from dualpipe_jax import (
    PipelineParams,
    dualpipe,
    lower,
    pipeline_value_and_grad,
    stack_stages,
)
from tests.executor.toy import make_mesh

WIDTH, RANK = 128, 2
SCHEDULE = dualpipe(2, 4)


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.lora = nnx.LoRA(WIDTH, RANK, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.base(x) + self.lora(x))


STAGES = [Adapted(nnx.Rngs(seed)) for seed in range(2)]
GRAPHDEF = nnx.graphdef(STAGES[0])
PARAMS = PipelineParams(
    stack_stages([nnx.state(stage) for stage in STAGES]), None, {"out": jnp.ones(WIDTH)}
)
X = jnp.ones((4, 2, WIDTH))


def stage_fn(params, x):
    return nnx.merge(GRAPHDEF, params)(x)


def loss_fn(head, y, targets):
    return jnp.mean((y @ head["out"] - targets[:, 0]) ** 2)


def make_step(trainable, **options):
    return pipeline_value_and_grad(
        stage_fn,
        loss_fn,
        schedule=SCHEDULE,
        mesh=make_mesh(pp=2),
        trainable=trainable,
        **options,
    )


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        (None, 4),
        (True, 4),
        (False, 0),
        (nnx.LoRAParam, 2),
        (nnx.Param, 3),
        (nnx.Not(nnx.LoRAParam), 2),
        ([nnx.LoRAParam, nnx.PathContains("out")], 3),
        (lambda path, value: path[0] == "base", 1),
        (nnx.State({"base": False, "lora": True}), 3),
        (PipelineParams(nnx.LoRAParam, head=False), 2),
        (PipelineParams(False), 1),
    ],
)
def test_what_a_choice_selects(trainable, trained):
    parts = PARAMS.partition(trainable)
    assert [len(jax.tree.leaves(part)) for part in parts] == [trained, 4 - trained]
    together = parts[0].combine(parts[1])
    assert jax.tree.structure(together) == jax.tree.structure(PARAMS)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(PARAMS), strict=True)
    )


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ({"bases": True}, "trainable is not a prefix of the parameters' tree"),
        (PipelineParams(head={"in": True}), "trainable.head is not a prefix of"),
        (3, "trainable=3 must be a bool, a prefix of bools"),
        (PipelineParams(head=0.5), "trainable.head=0.5 must be a bool"),
        ("lora", "trainable='lora' selects no floating parameter"),
        (False, "trainable=False selects no floating parameter"),
    ],
)
def test_choices_that_do_not_fit(trainable, message):
    with pytest.raises(ValueError, match=message):
        make_step(trainable).lower(PARAMS, X, X)


def test_gradients_of_inputs_alone():
    (losses, _), (grads, input_grads) = jax.eval_shape(
        make_step(False, input_grads=True), PARAMS, X, X
    )
    assert losses.shape == (4,)
    assert not jax.tree.leaves(grads)
    assert (input_grads.shape, input_grads.dtype) == (X.shape, X.dtype)
    with pytest.raises(ValueError, match="inputs hold no floating array"):
        make_step(None, input_grads=True, embed_fn=lambda _, tokens: X[0]).lower(
            PARAMS, jnp.zeros((4, 2), jnp.int32), X
        )


def test_gradients_fit_an_optimizer_of_what_is_trained():
    step, optimizer = make_step(nnx.LoRAParam), optax.adam(1e-3)

    def train_step(params, x):
        trained, frozen = params.partition(nnx.LoRAParam)
        opt_state = optimizer.init(trained)
        _, grads = step(params, x, x)
        with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
            updates, opt_state = optimizer.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates).combine(frozen), opt_state

    params, opt_state = jax.eval_shape(train_step, PARAMS, X)
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    assert len(jax.tree.leaves(opt_state)) == 1 + 2 * 2


@pytest.mark.parametrize("overlap", [False, True], ids=["compact", "overlapped"])
def test_frozen_parameters_have_no_products_and_no_accumulators(overlap):
    def text(trainable):
        return make_step(trainable, overlap=overlap).lower(PARAMS, X, X).as_text()

    trained, whole = text(PipelineParams(nnx.LoRAParam)), text(None)
    # One body for the gradient of `base`, or one in each kind of step with a B or W.
    kinds = sum(op in "BW" for kind in lower(SCHEDULE).kinds for op, _ in kind)
    fewer = whole.count("dot_general") - trained.count("dot_general")
    assert fewer == (kinds if overlap else 1)
    sizes = [make_step(t).buffers(PARAMS, X, X) for t in (nnx.LoRAParam, None)]
    chunks, itemsize = 2, 4
    lora = chunks * 2 * WIDTH * RANK * itemsize
    base, out = chunks * WIDTH * WIDTH * itemsize, WIDTH * itemsize
    assert [size.gradients for size in sizes] == [lora, lora + base + out]


def test_a_compiled_step_has_no_room_for_gradients_of_what_is_frozen():
    frozen, whole = (
        make_step(trainable).lower(PARAMS, X, X).compile().memory_analysis()
        for trainable in (nnx.LoRAParam, None)
    )
    base = WIDTH * WIDTH * 4
    assert whole.output_size_in_bytes - frozen.output_size_in_bytes >= base
    # At least the accumulators of both chunks.
    assert whole.temp_size_in_bytes - frozen.temp_size_in_bytes >= 2 * base
