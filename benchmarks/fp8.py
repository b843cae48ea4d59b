"""Trains a small model in bfloat16 and with products in float8, and compares losses.

    python benchmarks/fp8.py [--steps 300] [--seeds 3] [--out FILE.json]

The model is of `configs/tiny.py`'s kind with three layers, on one device, without a
pipeline; both runs of a seed have the same first parameters and the same batches. The
held-out loss is that of the same sequences for all. On CPUs float8 products are
products of the dequantized numbers in float32, so quantization is the same as on GPUs,
and the inexact sums of their tensor cores are missing.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import optax

from dualpipe_jax.configs import tiny
from dualpipe_jax.deepseek import DeepSeek
from dualpipe_jax.executor import PipelineAux
from dualpipe_jax.train import OptimizerConfig, load_text
from dualpipe_jax.train.data import held_out_batch, train_batch
from dualpipe_jax.train.optimizer import make_optimizer

SEQUENCE, SEQUENCES, HELD_OUT = 128, 8, 128
EVALUATE_EVERY = 50
PRODUCTS = {
    "bfloat16": {},
    "float8": {"products": "fp8", "payload": "fp8"},
    # How far apart runs are that differ in nothing but rounding: the first parameters
    # are rounded to bfloat16 once.
    "control": {},
}


def model_of(products):
    sizes = dataclasses.replace(tiny.architecture(), num_hidden_layers=3)
    return DeepSeek(
        architecture=sizes, compute_dtype="bfloat16", **PRODUCTS[products]
    ).build_unpipelined()


@functools.cache
def programs(products, num_steps):
    """The model, its optimizer, and its jitted step and held-out loss."""
    model = model_of(products)
    settings = OptimizerConfig(
        learning_rate=3e-3, warmup_steps=20, final_fraction=0.02, mean_dtype="bfloat16"
    )
    optimizer = make_optimizer(settings, num_steps)

    def run(params, buffers, inputs, targets):
        prepared = model.prepare_params(params, buffers)
        stage = jax.tree.map(lambda leaf: leaf[0], prepared.stages)
        x, aux = model.stage(stage, model.embed(prepared.embed, inputs))
        return prepared, x, aux

    def loss_of(params, buffers, inputs, targets):
        prepared, x, aux = run(params, buffers, inputs, targets)
        loss, loss_aux = model.loss(prepared.head, x, targets)
        aux = jax.tree.map(lambda leaf: leaf[None], aux)
        return loss, PipelineAux(aux, loss_aux)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, buffers, inputs, targets, number):
        grads, aux = jax.grad(loss_of, has_aux=True)(params, buffers, inputs, targets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        buffers, metrics = model.observe(buffers, aux, number)
        return optax.apply_updates(params, updates), opt_state, buffers, metrics["loss"]

    @jax.jit
    def evaluate(params, buffers, inputs, targets):
        def one(batch):
            prepared, x, _ = run(params, buffers, *batch)
            return model.evaluate(prepared.embed, prepared.head, x, batch[1])

        return jax.lax.map(one, (inputs, targets)).mean()

    return model, optimizer, step, evaluate


def train(products, seed, text, num_steps):
    """Returns the training losses, and held-out losses by step."""
    model, optimizer, step, evaluate = programs(products, num_steps)
    params = jax.jit(model.init)(jax.random.key(seed))
    if products == "control":
        params = jax.tree.map(
            lambda leaf: leaf.astype("bfloat16").astype(leaf.dtype), params
        )
    state = params, jax.jit(optimizer.init)(params), model.init_buffers()
    held_out = held_out_batch(
        text.held_out, (HELD_OUT // SEQUENCES, SEQUENCES), SEQUENCE
    )
    losses, found = [], {}
    for number in range(num_steps):
        batch = train_batch(
            text.train, (1, SEQUENCES), SEQUENCE, seed=seed, position=number * SEQUENCES
        )
        batch = [each[0] for each in batch]
        *state, loss = step(*state, *batch, np.int32(number + 1))
        losses.append(float(loss))
        if (number + 1) % EVALUATE_EVERY == 0:
            found[number + 1] = float(evaluate(state[0], state[2], *held_out))
    return losses, found


def table(runs):
    """Mean held-out losses of all seeds by step, relative to bfloat16's."""
    lines = [
        "",
        "| step | bfloat16 | float8 | | control | |",
        "|---|---|---|---|---|---|",
    ]
    for step in runs["bfloat16"][0]["held_out"]:
        plain, *others = (
            np.mean([record["held_out"][step] for record in records])
            for records in runs.values()
        )
        cells = [f"{other:.4f} | {other / plain - 1:+.2%}" for other in others]
        lines.append(f"| {step} | {plain:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = load_text(sequence_length=SEQUENCE)
    runs = {name: [] for name in PRODUCTS}
    with jax.numpy_dtype_promotion("standard"):
        for seed in range(args.seeds):
            for name, records in runs.items():
                started = time.perf_counter()
                losses, held_out = train(name, seed, text, args.steps)
                records.append({"seed": seed, "losses": losses, "held_out": held_out})
                last = list(held_out.values())[-1]
                seconds = time.perf_counter() - started
                print(f"seed {seed}, {name}: {last:.4f} ({seconds:.0f} s)", flush=True)
    print(table(runs))
    if args.out:
        args.out.write_text(json.dumps(runs) + "\n")


if __name__ == "__main__":
    main()
