"""Profiles in DeepSeek's names: records and reads them; see docs/profiles.md.

Imports: schedules, pictures, gpu.overlap. Reading needs no jax.
"""

from typing import TYPE_CHECKING

from dualpipe_jax.profiles.kernels import KernelSpan
from dualpipe_jax.profiles.reading import read_trace
from dualpipe_jax.profiles.records import Device, Kernel, Phase, Stream
from dualpipe_jax.profiles.report import TraceReport
from dualpipe_jax.profiles.rules import COMMUNICATION
from eplb_jax import lookup

if TYPE_CHECKING:
    from dualpipe_jax.profiles.profiling import profile

__all__ = [
    "COMMUNICATION",
    "Device",
    "Kernel",
    "KernelSpan",
    "Phase",
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
