"""Profiles: read them, and write them, in DeepSeek's names; see docs/profiles.md."""

from dualpipe_jax.trace.kernels import Span
from dualpipe_jax.trace.records import Device, Kernel, Phase, Stream
from dualpipe_jax.trace.report import TraceReport, read_trace
from dualpipe_jax.trace.rules import COMMUNICATION

__all__ = [
    "COMMUNICATION",
    "Device",
    "Kernel",
    "Phase",
    "Span",
    "Stream",
    "TraceReport",
    "read_trace",
]
