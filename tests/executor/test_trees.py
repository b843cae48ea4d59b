"""Structures are compared by what they hold, whatever they print as."""

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax import PipelineParams, dualpipe, stack_stages
from dualpipe_jax.executor.pipeline import pipeline_value_and_grad
from tests.executor.toy import make_mesh


@jax.tree_util.register_pytree_node_class
class Box:
    """A container that prints as its address."""

    def __init__(self, content, label=""):
        self.content, self.label = content, label

    def tree_flatten(self):
        return (self.content,), self.label

    @classmethod
    def tree_unflatten(cls, label, children):
        return cls(*children, label)


@jax.tree_util.register_pytree_node_class
class Mute(Box):
    """A container that prints nothing of what it holds."""

    def __repr__(self):
        return "Mute()"


def test_equal_stages_are_stacked():
    assert stack_stages([Box(jnp.ones(3)), Box(jnp.ones(3))]).content.shape == (2, 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Mute(jnp.ones(3, jnp.int32)), r"\[<flat index 0>\] is int32\[3\] against flo"),
        (Mute(jnp.ones(4)), r"is float32\[4\] against float32\[3\]"),
        (Mute(jnp.ones(3), "other"), "the structure is .*other.* against "),
        (Mute(None), "the structure is "),
        (Box(jnp.ones(3)), "the structure is .*Box.* against .*Mute"),
    ],
)
def test_stages_that_differ_are_refused(other, message):
    with pytest.raises(ValueError, match=rf"stages\[1\] differs from .*{message}"):
        stack_stages([Mute(jnp.ones(3)), other])


def build(*stage_fns):
    return pipeline_value_and_grad(
        list(stage_fns),
        lambda head, y, target: jnp.mean((y.content - target) ** 2),
        embed_fn=lambda embed, x: Mute(x),
        schedule=dualpipe(2, 4),
        mesh=make_mesh(pp=2),
    )


def stage(w, x):
    return Mute(x.content @ w)


def with_aux(box):
    return lambda w, x: (stage(w, x), box)


PARAMS = PipelineParams(jnp.ones((2, 4, 4)))
X = jnp.ones((4, 2, 4))


def test_activations_and_aux_may_be_of_any_class():
    step = build(with_aux(Box(jnp.zeros(()))), with_aux(Box(jnp.ones(()))))
    (_, aux), _ = jax.eval_shape(step, PARAMS, X, X)
    assert isinstance(aux, Box)
    assert aux.content.shape == (2,)


@pytest.mark.parametrize(
    ("stage_fns", "message"),
    [
        (
            (stage, lambda w, x: Mute(x.content.astype(jnp.bfloat16))),
            r"bfloat16\[2, 4\]; a stage must .* is bfloat16\[2, 4\] against float32",
        ),
        (
            (stage, lambda w, x: Box(x.content)),
            r"a stage must return what it takes.*the structure is .*Box",
        ),
        (
            (with_aux(Mute(jnp.zeros(()))), with_aux(Mute(jnp.int32(0)))),
            r"aux .*float32\[\], another's .*int32\[\].*zeros where",
        ),
    ],
)
def test_stages_must_agree(stage_fns, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build(*stage_fns), PARAMS, X, X)
