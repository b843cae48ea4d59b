"""jax's plugin for CUDA on machines without a GPU, where it compiles for others.

There it finds neither driver nor libraries, and needs none.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Where jax looks for them.
_GPUS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_NO_GPU = re.compile(
    rb"(WARNING: All log messages before absl::InitializeLog[^\n]*\n)?"
    rb"[^\n]*Could not find cuda drivers[^\n]*\n"
)


def skip_cuda_check() -> None:
    """Keeps jax from checking CUDA's libraries where there is no GPU.

    The check would fail with a traceback on the console of every program, and the
    plugin would not be loaded. A value that is set already stays.
    """
    if not _has_gpu():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


@contextlib.contextmanager
def without_messages() -> Iterator[None]:
    """In this block, drops what jax's libraries say about a GPU that is not there.

    jax 0.10's write it to the standard error when they are loaded, whatever is set.
    Everything else that is written there in the block is written at its end.
    """
    needed = not _has_gpu() and any(map(importlib.util.find_spec, _PLUGINS))
    if not needed or sys.stderr is None:
        yield
        return
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            with os.fdopen(stderr, "wb") as out:
                file.seek(0)
                out.write(_NO_GPU.sub(b"", file.read()))


def load() -> None:
    """Has jax load its plugins now, where jax is loaded; devices stay uninitialized."""
    if "jax" in sys.modules:
        topologies = importlib.import_module("jax.experimental.topologies")
        # Of no platform, so that nothing happens but what comes first.
        with contextlib.suppress(RuntimeError, NotImplementedError):
            topologies.get_topology_desc(platform="none")


def _has_gpu() -> bool:
    return any(Path(device).exists() for device in _GPUS)
