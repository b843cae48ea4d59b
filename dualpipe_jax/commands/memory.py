"""`python -m dualpipe_jax memory`: the memory report of a config's train step."""

from __future__ import annotations

import argparse

from dualpipe_jax.commands.gpu_config import add_gpu, load_for_gpus
from dualpipe_jax.gpu import gpu_compiler_options, memory_report, shared_kernels
from dualpipe_jax.train import TrainConfig, make_programs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memory` to a command's parser."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="as for train, or FILE.py:FUNCTION; its train step is compiled for GPUs, "
        "none of which are needed",
    )
    add_gpu(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Reports as `add_arguments` describes; returns 1 if the step does not fit.

    Raises:
      ValueError: bad input.
    """
    programs = make_programs(*load_for_gpus(TrainConfig, args.config, args.gpu))
    state, tokens = programs.abstract_state, programs.abstract_tokens
    step = programs.train_step.lower(state, tokens, tokens)
    task = programs.lower_costliest_task()
    with shared_kernels() as kernels:
        options = {**gpu_compiler_options(), **kernels}
        step, task = step.compile(options), task.compile(options)
    report = memory_report(
        step,
        buffers=programs.buffers(),
        task=task,
        arguments={
            "parameters": state.params,
            "optimizer": state.opt_state,
            "state of the router": state.buffers,
        },
        gpu=args.gpu,
    )
    print(report.to_json() if args.json else report)
    return int(report.spare is not None and report.spare < 0)
