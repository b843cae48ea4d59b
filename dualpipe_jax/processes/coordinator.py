"""jax's coordination service in a process of its own, beside process 0.

In process 0 it would end with it, and jax's client, which then ends every other
process from C++ (SIGABRT and a stack, jax 0.10.2), would be there before our
`watch` has said who was lost. This process outlives process 0 by a moment instead.

As a program, which takes what `Coordinator` does, it imports jaxlib only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

# Within which the others have read that process 0 is gone.
LINGER_S = 3.0
_READY, _END = "ready", "end"


class Coordinator:
    """The service, seen from process 0; it ends with this process.

    Args:
      port: where it listens, on all interfaces.
      num_processes: that connect.
      heartbeat: seconds without one after which jax gives a process up.
      shutdown: seconds that processes wait for each other when they end.

    Raises:
      ValueError: it cannot listen there.
    """

    def __init__(self, port: int, num_processes: int, heartbeat: int, shutdown: int):
        arguments = (f"[::]:{port}", num_processes, heartbeat, shutdown)
        # -P: the folder of this file must not come before the standard library. A
        # session of its own: Ctrl-C is for the processes that train.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if line != _READY:
            self._process.kill()
            self._process.wait()
            raise ValueError(
                f"jax's service cannot listen at port {port} ({line or 'it ended'}); "
                "choose a port that is free on the host of process 0."
            )

    def end(self) -> None:
        """Says that process 0 ends as it should: the service then ends with it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{_END}\n")
            self._process.stdin.flush()
        except OSError:  # it has ended already
            pass


def _serve(address: str, num_processes: int, heartbeat: int, shutdown: int) -> None:
    try:
        # jax has no public name for its service.
        from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

        service = _jax.get_distributed_runtime_service(
            address,
            num_processes,
            heartbeat_timeout=heartbeat,
            shutdown_timeout=shutdown,
        )
    except Exception as error:
        print(" ".join(str(error).split())[:300], flush=True)
        return
    print(_READY, flush=True)
    ended_well = sys.stdin.read().startswith(_END)  # returns when process 0 is gone
    if not ended_well:
        time.sleep(LINGER_S)
    del service
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], *map(int, sys.argv[2:]))
