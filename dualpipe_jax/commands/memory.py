"""`python -m dualpipe_jax memory`: the memory report from the command line."""

from __future__ import annotations

import argparse

from dualpipe_jax.gpu import GPUS, gpu_compiler_options, gpu_mesh, memory_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memory` to a command's parser."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="as for train, or FILE.py:FUNCTION; its train step is compiled for GPUs "
        "that need not be there",
    )
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), default="h100", help="(%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Reports as `add_arguments` describes; 1 where the step does not fit.

    Raises:
      ValueError: bad input.
    """
    # The training job is not needed to read a module.
    from dualpipe_jax.train import load_config, make_programs

    config = load_config(args.config)
    programs = make_programs(config, gpu_mesh(args.gpu, config.mesh_shape))
    state, tokens = programs.abstract_state, programs.abstract_tokens
    options = gpu_compiler_options()
    report = memory_report(
        programs.train_step.lower(state, tokens, tokens).compile(options),
        buffers=programs.buffers(),
        task=programs.lower_costliest_task().compile(options),
        arguments={
            "parameters": state.params,
            "optimizer": state.opt_state,
            "state of the router": state.buffers,
        },
        gpu=args.gpu,
    )
    print(report.to_json() if args.json else report)
    return int(report.spare is not None and report.spare < 0)
