"""Programs that compile in half a second, for tests of the loop around them.

They train a table of which byte follows which, without any pipeline. As a program
(`python -m tests.train.cheap train tests/train/cheap.py ...`) this is the command
line, with these programs in place of a model's.
"""

import dataclasses
import os
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualpipe_jax import dualpipe
from dualpipe_jax.commands import main as cli
from dualpipe_jax.train import loop
from tests.train import tiny

NUM_TOKENS = 256


def config():
    """Eight steps, with checkpoints and evaluations that do not coincide."""
    return dataclasses.replace(
        tiny.config(), name="cheap", num_steps=8, eval_every=4, checkpoint_every=3
    )


class State(NamedTuple):
    """Of which `table` lies on all devices, a part on each."""

    step: Any
    table: Any
    momentum: Any


class CheapPrograms:
    """What the loop asks of `Programs`."""

    def __init__(self, config, size=NUM_TOKENS):
        self.mesh = jax.make_mesh(
            (jax.device_count(),), ("x",), axis_types=(AxisType.Auto,)
        )
        self.schedule = dualpipe(2, 4)
        self.checkpoint_info = {"tokens": size}
        self.sample = self.published = None
        self.grad_names = ("table",)
        self.vocab_size = NUM_TOKENS
        self.collectives = {}
        self.description = "a table of bytes"
        self.compiled = None
        split, whole = (
            NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in (["x"], [])
        )
        shardings = State(whole, split, split)

        def init():
            # Not zeros, which would be stored in no bytes.
            table = 0.01 * jax.random.normal(jax.random.key(0), (size, NUM_TOKENS))
            return State(jnp.zeros((), jnp.int32), table, jnp.zeros_like(table))

        def loss_fn(table, inputs, targets):
            logits = table[inputs]
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
            return (jax.nn.logsumexp(logits, axis=-1, keepdims=True) - picked).mean()

        def train_step(state, inputs, targets):
            loss, grads = jax.value_and_grad(loss_fn)(state.table, inputs, targets)
            momentum = 0.5 * state.momentum + grads
            state = State(state.step + 1, state.table - 40 * momentum, momentum)
            return state, {"loss": loss, "grad_norm": jnp.linalg.norm(grads)}

        self.init = jax.jit(init, out_shardings=shardings)
        self._train_step = jax.jit(train_step, out_shardings=(shardings, None))
        self._held_out_loss = jax.jit(
            lambda state, *batch: loss_fn(state.table, *batch)
        )
        self.abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            jax.eval_shape(init),
            shardings,
        )

    def restore_plan(self, info):
        if info != self.checkpoint_info:
            raise ValueError(f"the checkpoint is of {info['tokens']} tokens.")
        return self.abstract_state, lambda state: state

    def check_tokens(self, tokens):
        assert tokens.max() < NUM_TOKENS

    def compile(self, progress=None):
        return self

    def train_step(self, state, inputs, targets):
        time.sleep(float(os.environ.get("CHEAP_STEP_SECONDS", "0")))
        return self._train_step(state, *self._whole(inputs, targets))

    def held_out_loss(self, state, inputs, targets):
        return self._held_out_loss(state, *self._whole(inputs, targets))

    def _whole(self, *batch):
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return [
            jax.make_array_from_callback(x.shape, sharding, lambda i, x=x: x[i])
            for x in map(np.asarray, batch)
        ]


if __name__ == "__main__":
    loop.make_programs = CheapPrograms
    sys.exit(cli.main(sys.argv[1:]))
