"""Profiles in DeepSeek's names: read them and write them; see docs/profiles.md.

Imports: schedules, pictures, gpu.overlap. Reading needs no jax.
"""

from typing import TYPE_CHECKING

from dualpipe_jax.profiles.kernels import Span
from dualpipe_jax.profiles.records import Device, Kernel, Phase, Stream
from dualpipe_jax.profiles.report import TraceReport, read_trace
from dualpipe_jax.profiles.rules import COMMUNICATION
from eplb_jax import lookup

if TYPE_CHECKING:
    from dualpipe_jax.profiles.profiling import profile

__all__ = [
    "COMMUNICATION",
    "Device",
    "Kernel",
    "Phase",
    "Span",
    "Stream",
    "TraceReport",
    "profile",
    "read_trace",
]

__getattr__, __dir__ = lookup.attach(
    __name__,
    {
        "profile": "dualpipe_jax.profiles.profiling",
    },
)
