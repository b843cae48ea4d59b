"""Runs the processes of one machine, and starts them again when some are lost."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dualpipe_jax.processes.group import Ended, Group
from dualpipe_jax.processes.signals import handled
from dualpipe_jax.processes.watch import LOST

# After the first of them has failed; the others notice at once, unless stopped.
GRACE_S = 15.0


class Layout(NamedTuple):
    """What a start runs on.

    Attributes:
      name: of the mesh, as `--mesh` takes it; empty: the run's own.
      num_devices: of that mesh, on all machines.
    """

    name: str
    num_devices: int


@dataclasses.dataclass(frozen=True)
class Machines:
    """Which of several machines this is; by default the only one.

    Attributes:
      count: machines of the run.
      this: number of this one, from 0.
      coordinator: HOST:PORT of the first one; None: a free port here.
    """

    count: int = 1
    this: int = 0
    coordinator: str | None = None

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.this < self.count:
            raise ValueError(
                f"node={self.this} must be below nodes={self.count}, from 0."
            )
        if self.count > 1 and self.coordinator is None:
            raise ValueError(
                f"nodes={self.count} need --coordinator HOST:PORT, of the first one."
            )

    @classmethod
    def of_slurm(cls) -> Machines:
        """The nodes of a Slurm step, and which one this is.

        Raises:
          ValueError: Slurm has not started this process.
        """
        from jax._src.clusters.slurm_cluster import SlurmCluster  # no public name

        try:
            count, this = (
                int(os.environ["SLURM_NNODES"]),
                int(os.environ["SLURM_NODEID"]),
            )
            address = SlurmCluster.get_coordinator_address(None, None)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"Slurm's environment is not complete ({error}); start this with srun, "
                "or give --nodes, --node and --coordinator."
            ) from error
        return cls(count, this, address if count > 1 else None)


@dataclasses.dataclass(frozen=True)
class Launch:
    """What to start, and how often.

    Attributes:
      command: of one process, without what tells it which one it is.
      num_processes: on this machine.
      layouts: the run's own, then those to fall back to, in this order.
      restarts: how often in a row the run may fail on a layout without a new
        checkpoint before the next layout is tried.
      saved: returns the step of the newest checkpoint, or None.
      say: called with a line for the console.
      remember: called with what the run's report should tell.
      machines: which one this is. With several, nothing is started again here: that
        is left to whatever starts this on all of them.
      environment: of all processes, beside this one's.
      gpus: returns the numbers of this machine's GPUs; see `local_gpus`.
      grace: seconds that the others have to end by themselves.
    """

    command: Sequence[str]
    num_processes: int
    layouts: Sequence[Layout]
    restarts: int
    saved: Callable[[], int | None]
    say: Callable[[str], object]
    remember: Callable[[str], object]
    machines: Machines = Machines()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gpus: Callable[[], list[int] | None] = lambda: None
    grace: float = GRACE_S

    def __post_init__(self):
        if self.num_processes < 1:
            raise ValueError(f"processes={self.num_processes} must be at least 1.")
        if self.restarts < 0:
            raise ValueError(f"restarts={self.restarts} must be at least 0.")
        if self.machines.count > 1 and len(self.layouts) > 1:
            raise ValueError(
                "--fallback is for one machine: of several, whatever starts this on "
                "all of them decides."
            )
        total = self.num_processes * self.machines.count
        if self.layouts[0].num_devices % total:
            raise ValueError(
                f"{total} processes do not share the mesh's "
                f"{self.layouts[0].num_devices} devices evenly; choose --processes so "
                "that they do."
            )

    def run(self) -> int:
        """Runs until the end, or until no layout is left; returns the exit status."""
        failures, again = 0, False
        left = self._fitting(self.layouts)
        if not left:
            raise ValueError(
                f"no mesh fits the {len(self.gpus() or ())} GPUs of this machine; the "
                "smallest needs "
                f"{min(layout.num_devices for layout in self.layouts)}."
            )
        while True:
            before = self.saved()
            ended = self._run_once(left[0], again)
            if not _is_worth_repeating(ended) or self.machines.count > 1:
                return _status(ended)
            saved, again = self.saved(), True
            failures = 1 if saved != before else failures + 1
            now = self._fitting(left)
            if failures > self.restarts:
                now = [layout for layout in now if layout is not left[0]]
            if now[:1] != left[:1]:
                failures = 0
            left = now
            if not left:
                self._tell(f"{ended.how}; not started again: no restart is left")
                return _status(ended)
            where = f" on {left[0].name}" if left[0].name else ""
            since = (
                "the beginning" if saved is None else f"the checkpoint of step {saved}"
            )
            self._tell(f"{ended.how}; started again{where} from {since}")

    def _tell(self, line: str) -> None:
        self.say(line)
        self.remember(line)

    def _fitting(self, layouts: Sequence[Layout]) -> list[Layout]:
        """Those for which there are enough devices."""
        gpus = self.gpus()
        if gpus is None:
            return list(layouts)
        most = len(gpus) * self.machines.count
        return [layout for layout in layouts if layout.num_devices <= most]

    def _run_once(self, layout: Layout, resume: bool) -> Ended:
        here = self.num_processes
        if self.machines.count == 1:
            here = most_that_share(layout.num_devices, here)
        total, first = here * self.machines.count, here * self.machines.this
        several: list[str] = []
        if total > 1:
            address = self.machines.coordinator or f"127.0.0.1:{_free_port()}"
            several = ["--coordinator", address, "--num-processes", str(total)]
        mesh = ["--mesh", layout.name] if layout.name else []
        again = ["--resume"] if resume else []
        command = [*self.command, *again, *mesh, *several]
        commands = [
            [*command, *(["--process-id", str(first + i)] if several else [])]
            for i in range(here)
        ]
        gpus = self.gpus()
        environments = [dict(self.environment) for _ in range(here)]
        if gpus is not None:
            share = layout.num_devices // total
            for i, environment in enumerate(environments):
                own = gpus[i * share : (i + 1) * share]
                environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, own))
        group = Group(commands, environments, grace=self.grace)
        try:
            with handled(lambda number, _: group.signal(number)):
                ended = group.wait()
        finally:
            group.kill()
        for line in ended.lines:
            self.say(f"[{first + (ended.first or 0)}] {line}")
        return ended if group.num_signals == 0 else ended._replace(first=None)


def most_that_share(num_devices: int, most: int) -> int:
    """The largest number of processes, at most `most`, that share devices evenly.

    Examples:
      >>> most_that_share(4, 4), most_that_share(6, 4), most_that_share(2, 4)
      (4, 3, 2)
    """
    return max(n for n in range(1, most + 1) if num_devices % n == 0)


def local_gpus() -> list[int] | None:
    """Numbers of this machine's GPUs, as jax counts them; None: there is none.

    They are asked of the driver's own tool: jax would keep them for itself.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    try:
        listed = subprocess.run(
            [tool, "--list-gpus"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = min(count, len([each for each in visible.split(",") if each.strip()]))
    return list(range(count)) if count else None


def _is_worth_repeating(ended: Ended) -> bool:
    """Whether a process was lost. Bad input (2) or a bad end (1) would come again."""
    return ended.first is not None and all(
        status in (0, LOST) or status < 0 for status in ended.statuses
    )


def _status(ended: Ended) -> int:
    """The exit status of a group: of the process that tells most."""
    told = [status for status in ended.statuses if status not in (0, LOST)]
    if errors := [status for status in told if status > 0]:
        return max(errors)
    return LOST if told or LOST in ended.statuses else 0


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
