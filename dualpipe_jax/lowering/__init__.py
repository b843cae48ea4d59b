"""Lowers a schedule to the program that SPMD ranks run: ticks, slots and permutes.

Imports: schedules. Without jax.
"""

from dualpipe_jax.lowering.loops import Loop as Loop
from dualpipe_jax.lowering.program import Kind as Kind, Program, lower
from dualpipe_jax.lowering.table import Table as Table

__all__ = [
    "Program",
    "lower",
]
