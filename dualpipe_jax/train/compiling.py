"""Compiles several programs at once, and shows which ones XLA is still working on."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from jax.sharding import Mesh
from rich.console import Console
from rich.live import Live
from rich.text import Text

from dualpipe_jax import compat


class Job(NamedTuple):
    """A program to compile.

    Attributes:
      name: for the reader of a log.
      lower: traces and lowers it.
      compile: from what `lower` returns to the compiled program.
    """

    name: str
    lower: Callable[[], Any]
    compile: Callable[[Any], Any]


def compile_together(
    jobs: Sequence[Job],
    progress: CompileProgress | None = None,
    *,
    mesh: Mesh | None = None,
) -> list[Any]:
    """Lowers programs one after another, and compiles each in another thread.

    XLA's passes use one thread per program, and leave Python's lock to the tracing of
    the next one. For GPUs only one program compiles at a time: XLA chooses kernels by
    timing them on the device, which another compilation would disturb.

    Args:
      jobs: the one that takes longest first.
      progress: where to show it.
      mesh: the devices; None: CPUs.

    Returns:
      The compiled programs, in the order of the jobs.
    """
    progress = progress or CompileProgress(Console(quiet=True))
    on_cpu = mesh is None or compat.platform_of(mesh) == "cpu"
    num_threads = len(jobs) if on_cpu else 1
    with rare_collections(), futures.ThreadPoolExecutor(num_threads) as pool:
        running = []
        for job in jobs:
            progress.tracing(job.name)
            lowered = job.lower()
            progress.compiling(job.name, num_operations(lowered))
            compiled = pool.submit(job.compile, lowered)
            compiled.add_done_callback(lambda _, name=job.name: progress.done(name))
            running.append(compiled)
        progress.all_lowered()
        return [each.result() for each in running]


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Lets Python look for garbage less often.

    Tracing makes objects by the million and hardly any garbage; looking for it takes
    10 to 20 % of the time.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def num_operations(lowered: Any) -> int:
    """How many StableHLO operations a lowered program has.

    Examples:
      >>> import jax
      >>> num_operations(jax.jit(lambda x: x + x).lower(1.0))  # with func and return
      4
    """

    def count(operation: Any) -> int:
        inside = (
            count(each.operation)
            for region in operation.regions
            for block in region
            for each in block.operations
        )
        return 1 + sum(inside)

    return count(lowered.compiler_ir().operation)


class CompileProgress:
    """Says what compiles, how large it is, and for how long; a context manager.

    On a terminal this is a line that vanishes at the end. Elsewhere one line is
    printed, once all programs are lowered.

    Args:
      console: where to.

    Examples:
      >>> with CompileProgress(Console(width=80)) as progress:
      ...     progress.compiling("train step", 52_168)
      ...     progress.compiling("evaluation", 9_525)
      ...     progress.all_lowered()
      compiling train step (52,168 operations), evaluation (9,525 operations)
    """

    def __init__(self, console: Console):
        self._console = console
        self._started = time.perf_counter()
        self._tracing: str | None = None
        self._sizes: dict[str, int] = {}
        self._pending: dict[str, int] = {}
        self._live = Live(
            get_renderable=lambda: Text(self.text),
            console=console,
            refresh_per_second=4,
            transient=True,
        )

    def __enter__(self) -> CompileProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def tracing(self, name: str) -> None:
        """Python begins to trace and lower a program."""
        self._tracing = name

    def compiling(self, name: str, num_operations: int) -> None:
        """XLA begins to compile it."""
        self._tracing = None
        self._sizes[name] = self._pending[name] = num_operations

    def done(self, name: str) -> None:
        """It is compiled. May be called from any thread."""
        self._pending.pop(name, None)

    def all_lowered(self) -> None:
        """No other program will follow."""
        if not self._console.is_terminal:
            self._console.print(_compiling(self._sizes))

    @property
    def elapsed_s(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self._started

    @property
    def text(self) -> str:
        """What is pending, and for how many seconds."""
        parts = [f"tracing {self._tracing}"] if self._tracing else []
        # A copy: other threads take from it.
        if pending := dict(self._pending):
            parts.append(_compiling(pending))
        return f"{'; '.join(parts) or 'starting'}: {self.elapsed_s:.0f} s"


def _compiling(sizes: dict[str, int]) -> str:
    programs = (f"{name} ({size:,} operations)" for name, size in sizes.items())
    return f"compiling {', '.join(programs)}"
