"""Runs of the job with programs that compile nothing, for the tests of its loop."""

import dataclasses
import io

import numpy as np
from rich.console import Console

from dualpipe_jax.train import Text, train
from tests.train import cheap

TEXT = Text(
    train=np.tile(np.arange(64, dtype=np.uint8), 50),
    held_out=np.tile(np.arange(64, dtype=np.uint8), 5),
    source="counting",
)


def run(folder, *, resume=False, profile_steps=0, text=TEXT, **changes):
    config = dataclasses.replace(cheap.config(), **changes)
    console = Console(file=io.StringIO(), width=200, soft_wrap=True)
    result = train(
        config,
        text,
        folder,
        resume=resume,
        console=console,
        profile_steps=profile_steps,
    )
    return result, console.file.getvalue()


def without_clock(records):
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in records]
