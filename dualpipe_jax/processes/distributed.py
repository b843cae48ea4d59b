"""Several processes as one run: how they connect, and how they agree.

Processes learn about each other only through the functions below. With one process
each of them returns at once.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # jax has no public name for its state
from jax.experimental import multihost_utils

from dualpipe_jax.processes import rendezvous
from dualpipe_jax.processes.coordinator import Coordinator
from dualpipe_jax.processes.group import launcher
from dualpipe_jax.processes.watch import HEARTBEAT_S, Watch

PyTree = Any

TIMEOUT_S = 60.0
# As good as no limit: 11 days.
MOST_S = 1e6
_NOWHERE = "127.0.0.1:0"  # a port that nobody is told
_TEXT_BYTES = 256
_meetings = itertools.count()  # all processes count alike


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = TIMEOUT_S,
    heartbeat: float = HEARTBEAT_S,
    step_timeout: float = 0,
) -> Watch:
    """Makes this process one of several. Call it before jax initializes its devices.

    Without arguments, they are read from the cluster's environment: jax knows Slurm,
    Open MPI, Kubernetes and Cloud TPU.

    Args:
      coordinator: HOST:PORT of process 0, at a port that is free there.
      num_processes: of the run.
      process_id: of this one, below `num_processes`.
      timeout: seconds within which all processes must connect.
      heartbeat: seconds without a sign of life after which a process is lost. All
        others then say so and end, with the exit status `watch.LOST`; likewise if one
        ends by itself, or by an error. A process that is killed is lost at once.
      step_timeout: seconds that a step may take, see `Watch`; 0: any.

    Returns:
      What watches the others, from a thread, until this process ends.

    Raises:
      ValueError: bad arguments, no such environment, or a process does not connect.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    local_devices = None
    if len(missing) == len(given):
        coordinator, num_processes, process_id, local_devices = _of_cluster(timeout)
    elif missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given too: several processes need "
            f"{', '.join(given)}, or none of them in a cluster's environment."
        )
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    if num_processes < 1:
        raise ValueError(f"{num_processes=} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"{process_id=} must be at least 0 and below {num_processes=}; number the "
            "processes from 0."
        )
    _check_seconds(timeout, heartbeat, step_timeout)
    connections = rendezvous.meet(coordinator, num_processes, process_id, timeout)
    # Its handler of SIGTERM would replace the loop's.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax ends a process from C++ where it loses another; the watch comes first.
    patience = max(100, round(4 * heartbeat))
    limit = max(1, round(timeout))
    if process_id == 0:
        port = rendezvous.parse_address(coordinator)[1]
        service = Coordinator(port, num_processes, patience, limit)
        atexit.register(service.end)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids=local_devices,
        initialization_timeout=limit,
        # Process 0's own service has nobody to serve.
        coordinator_bind_address=_NOWHERE,
        heartbeat_timeout_seconds=patience,
        shutdown_timeout_seconds=limit,
    )
    return Watch(
        connections,
        process_id,
        heartbeat=heartbeat,
        step_timeout=step_timeout,
        launcher=launcher(),
    )


def _check_seconds(timeout: float, heartbeat: float, step_timeout: float) -> None:
    for name, value in (("timeout", timeout), ("heartbeat", heartbeat)):
        if not 0 < value < MOST_S:
            raise ValueError(
                f"{name}={value} must be positive seconds, below {MOST_S:g}."
            )
    if not 0 <= step_timeout < MOST_S:
        raise ValueError(
            f"{step_timeout=} must be seconds, below {MOST_S:g}; 0 is no limit."
        )


def _of_cluster(timeout: float) -> tuple:
    """Address, number of processes, own number and own devices, as jax finds them.

    jax.distributed.initialize would find the same, but aborts the process if it fails.
    """
    from jax._src.clusters import ClusterEnv  # jax has no public name for it

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, max(1, round(timeout))
        )
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"the cluster's environment is not complete ({error}); give --coordinator, "
            "--num-processes and --process-id."
        ) from error
    if found[0] is None:
        raise ValueError(
            "no cluster's environment was found (Slurm, Open MPI, Kubernetes, Cloud "
            "TPU); give --coordinator, --num-processes and --process-id."
        )
    return found


def agree(
    facts: Mapping[str, str],
    *,
    verb: str = "was started with",
    advice: str = "start all with the same config, options, data and versions",
    timeout: float = TIMEOUT_S,
) -> None:
    """Checks that all processes have the same facts, without using their devices.

    Args:
      facts: for each name the value, in words.
      verb: what a process does with them, for the error.
      advice: how to make them equal.
      timeout: seconds within which all processes must call this.

    Raises:
      ValueError: they do not, or one of them does not call this; in all processes.

    Examples:
      >>> agree({"num_steps": "8"})
    """
    number, client = num_processes(), distributed.global_state.client
    if number == 1 or client is None:
        return
    folder = f"dualpipe_jax/agree/{next(_meetings)}"
    own = distributed.global_state.process_id
    client.key_value_set(f"{folder}/{own}", json.dumps(dict(facts)))
    try:
        client.wait_at_barrier(folder, round(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"not all of {number} processes began to train within {timeout:g} s; see "
            "what the others say."
        ) from error
    first, *others = (
        json.loads(client.blocking_key_value_get(f"{folder}/{i}", 1000))
        for i in range(number)
    )
    for i, other in enumerate(others, 1):
        if differ := [n for n in first | other if first.get(n) != other.get(n)]:
            one, zero = (
                ", ".join(f"{name}={each.get(name)}" for name in differ[:3])
                for each in (other, first)
            )
            raise ValueError(
                f"process {i} {verb} {one}, but process 0 {verb} {zero}; {advice}."
            )


def num_processes() -> int:
    """As `jax.process_count`, but without initializing jax's devices."""
    return distributed.global_state.num_processes or 1


def is_main() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def on_host(tree: PyTree) -> PyTree:
    """Gathers whole arrays into this process's memory; all processes call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    return jax.tree.map(gather, tree)


def barrier(name: str) -> None:
    """Waits until every process has called this, however long the others take.

    Collectives of devices do not wait so long: those of CPUs 30 s.
    """
    client = distributed.global_state.client
    if num_processes() > 1 and client is not None:
        name = f"dualpipe_jax/{name}/{next(_meetings)}"
        client.wait_at_barrier(name, round(1000 * MOST_S))


def text_of_main(name: str, text: str) -> str | None:
    """The text of process 0, without using devices.

    Args:
      name: of the text; it has one in a run.
      text: process 0's own.

    Returns:
      The text, or None if process 0 has not called this within a minute.
    """
    client, name = distributed.global_state.client, f"dualpipe_jax/{name}"
    if num_processes() == 1 or client is None:
        return text
    try:
        if is_main():
            client.key_value_set(name, text, allow_overwrite=True)
            return text
        return client.blocking_key_value_get(name, round(1000 * TIMEOUT_S))
    except jax.errors.JaxRuntimeError:
        return None


def all_texts(text: str) -> list[str]:
    """Gathers a text from each process; all of them get the same list.

    Args:
      text: a line, cut off after 256 bytes where there are several processes.

    Examples:
      >>> all_texts("done")
      ['done']
    """
    if jax.process_count() == 1:
        return [text]
    line = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = text.encode()[:_TEXT_BYTES]
    line[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    lines = np.asarray(multihost_utils.process_allgather(line))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in lines]


def first_text(text: str | None) -> str | None:
    """The text of the first process that has one; all of them get the same.

    Examples:
      >>> first_text(None), first_text("SIGTERM")
      (None, 'SIGTERM')
    """
    return next(filter(None, all_texts(text or "")), None)
