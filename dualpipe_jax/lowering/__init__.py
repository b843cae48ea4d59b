"""Lowers a schedule to the program that SPMD ranks run: ticks, slots and permutes.

Imports: schedules. Without jax.
"""

from dualpipe_jax.lowering.program import Program, Table as Table, lower
from dualpipe_jax.lowering.ticks import Kind as Kind, Loop as Loop

__all__ = [
    "Program",
    "lower",
]
