"""Compares the main job with the same model on one device: losses and CPU time.

    python benchmarks/train.py                        all, twenty minutes on two cores
    python benchmarks/train.py --only dualpipe        one schedule, or "resume"

The reference is `jax.value_and_grad` over a loop of microbatches on one device. Times
are CPU times of the process: medians of steps that alternate with the reference's, so
that a busy machine slows both.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import optax
from rich.console import Console

from dualpipe_jax.configs import tiny
from dualpipe_jax.executor import PipelineAux
from dualpipe_jax.train import load_text, make_programs, train
from dualpipe_jax.train.data import train_batch
from dualpipe_jax.train.optimizer import make_optimizer

NUM_STEPS = 20
SCHEDULES = ("dualpipe", "dualpipev", "1f1b", "zb1p", "gpipe")


def batches(config, text):
    shape = (config.num_microbatches, config.microbatch_size)
    for number in itertools.count():
        yield train_batch(
            text.train,
            shape,
            config.sequence_length,
            seed=config.seed,
            position=number * shape[0] * shape[1],
        )


@functools.cache
def unpipelined_step(model_config, count, optimizer_config):
    """The model on one device, and its jitted step: compiled once for all schedules."""
    model = model_config.build_unpipelined(num_microbatches=count)
    optimizer = make_optimizer(optimizer_config, NUM_STEPS)

    def mean_loss(params, buffers, inputs, targets):
        prepared = model.prepare_params(params, buffers)
        stage = jax.tree.map(lambda leaf: leaf[0], prepared.stages)

        def one(batch):
            x, aux = model.stage(stage, model.embed(prepared.embed, batch[0]))
            loss, loss_aux = model.loss(prepared.head, x, batch[1])
            return loss, PipelineAux(
                jax.tree.map(lambda leaf: leaf[None], aux), loss_aux
            )

        losses, aux = jax.lax.map(one, (inputs, targets))
        return losses.mean(), jax.tree.map(lambda leaf: leaf.sum(axis=0), aux)

    @jax.jit
    def step(params, opt_state, buffers, inputs, targets, number):
        grad = jax.value_and_grad(mean_loss, has_aux=True)
        (_, aux), grads = grad(params, buffers, inputs, targets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        buffers, metrics = model.observe(buffers, aux, number)
        params = optax.apply_updates(params, updates)
        return params, opt_state, buffers, metrics["loss"]

    return model, optimizer, step


def unpipelined(config, text):
    """Yields (loss, CPU seconds) of each step on one device."""
    model, optimizer, step = unpipelined_step(
        config.model, config.num_microbatches, config.optimizer
    )
    params = jax.jit(model.init)(jax.random.key(config.seed))
    state = (params, jax.jit(optimizer.init)(params), model.init_buffers())
    for number, batch in enumerate(batches(config, text)):
        started = time.process_time()
        *state, loss = jax.block_until_ready(step(*state, *batch, np.int32(number + 1)))
        yield float(loss), time.process_time() - started


def pipelined(config, text):
    """The same for the pipelined program."""
    programs = make_programs(config).compile()
    state = programs.init()
    for batch in batches(config, text):
        started = time.process_time()
        state, metrics = jax.block_until_ready(programs.train_step(state, *batch))
        yield float(metrics["loss"]), time.process_time() - started


def compare(config, text):
    """(largest relative difference of the losses, ratio of CPU time, balancedness)."""
    pairs = list(
        itertools.islice(
            zip(pipelined(config, text), unpipelined(config, text), strict=False),
            NUM_STEPS,
        )
    )
    ours, theirs = np.array(pairs).transpose(1, 2, 0)
    difference = np.max(np.abs(ours[0] / theirs[0] - 1))
    # The first step of each compiles, or warms up.
    times = [statistics.median(each[1][2:]) for each in (ours, theirs)]
    return difference, *times


def resumed(config, text, console):
    """The largest relative difference after resuming on pp=2 x ep=2 with DualPipeV."""
    config = dataclasses.replace(config, checkpoint_every=NUM_STEPS // 2)
    smaller = dataclasses.replace(config, mesh={"pp": 2, "ep": 2}, schedule="dualpipev")
    with tempfile.TemporaryDirectory() as folder:
        whole = train(config, text, folder, console=console).metrics
        shutil.rmtree(Path(folder, "checkpoints", str(NUM_STEPS)))
        again = train(smaller, text, folder, resume=True, console=console).metrics
    losses = np.array([[r["loss"] for r in records] for records in (whole, again)])
    return np.max(np.abs(losses[0] / losses[1] - 1))


def config_for(schedule):
    """The main job; on four ranks DualPipeV has eight stages, more than its layers."""
    config = dataclasses.replace(tiny.config(), schedule=schedule, sample_tokens=0)
    if schedule == "dualpipev":
        config = dataclasses.replace(config, mesh={"pp": 2, "dp": 2, "ep": 2})
    return dataclasses.replace(config, num_steps=NUM_STEPS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [*SCHEDULES, "resume"]
    parser.add_argument("--only", nargs="+", choices=everything, default=everything)
    args = parser.parse_args()
    text = load_text(sequence_length=tiny.config().sequence_length)
    print(f"{NUM_STEPS} steps of configs/tiny.py; jax {jax.__version__}", flush=True)
    print(f"{'':10} {'mesh':20} {'largest':>9} {'CPU s':>7} {'one':>7}")
    print(f"{'':10} {'':20} {'difference':>10} {'step':>6} {'device':>7} ratio")
    for name in args.only:
        if name == "resume":
            difference = resumed(config_for("dualpipe"), text, Console(quiet=True))
            print(
                f"resumed on pp=2 x ep=2 with DualPipeV: {difference:.1e}", flush=True
            )
            continue
        config = config_for(name)
        mesh = " x ".join(f"{axis}={size}" for axis, size in config.mesh.items())
        difference, ours, theirs = compare(config, text)
        row = f"{name:10} {mesh:20} {difference:10.1e} {ours:6.2f} {theirs:7.2f}"
        print(f"{row} {ours / theirs:5.2f}", flush=True)


if __name__ == "__main__":
    main()
