"""Reads a profile from a file, or from the folder of a jax.profiler trace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dualpipe_jax.profiles.events import read_events
from dualpipe_jax.profiles.kernels import Collector
from dualpipe_jax.profiles.names import read_names
from dualpipe_jax.profiles.report import TraceReport
from dualpipe_jax.profiles.rules import Rule, communication_rule


def read_trace(
    path: str | os.PathLike[str],
    communication: str | Sequence[str] | Rule | None = None,
) -> TraceReport:
    """Reads a profile: a Chrome or Perfetto trace in JSON.

    Args:
      path: a .json or .json.gz, written by torch.profiler's `export_chrome_trace`, by
        jax.profiler or by this library; or a folder, whose newest jax.profiler trace is
        read. Events are read one at a time and only kernels are kept, so a file may
        have several hundred megabytes.
      communication: regular expressions that match the names of further kernels that
        communicate, beside `dualpipe_jax.profiles.COMMUNICATION`; or a function of a
        name that replaces them.

    Raises:
      ValueError: the file is empty, truncated, not a trace, or has no kernels; or an
        expression is invalid.
      OSError: the file cannot be read.

    Examples:
      >>> import json, tempfile
      >>> file = Path(tempfile.mkdtemp()) / "trace.json"
      >>> kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 5, "dur": 2}
      >>> _ = file.write_text(json.dumps({"traceEvents": [kernel]}))
      >>> read_trace(file).kernels
      (Kernel(name='gemm', is_comm=False, count=1, total_us=2.0),)
    """
    rule = communication_rule(communication)
    file = find_trace(Path(path))
    collector = Collector(rule, read_names(file))
    for event in read_events(file):
        collector.add(event)
    spans = sorted(collector.spans(), key=lambda span: (span.begin_us, span.end_us))
    return TraceReport(file.name, tuple(spans))


def find_trace(path: Path) -> Path:
    """Returns the file itself, or the newest jax.profiler trace in a folder.

    Of several hosts' traces of the same time, it is the last by name.
    """
    if not path.is_dir():
        return path
    found = sorted(
        path.rglob("*.trace.json.gz"), key=lambda file: (file.parent.name, file.name)
    )
    if not found:
        raise ValueError(
            f"path={str(path)!r} is a folder without a *.trace.json.gz of "
            "jax.profiler; pass the path of a trace, .json or .json.gz."
        )
    return found[-1]
