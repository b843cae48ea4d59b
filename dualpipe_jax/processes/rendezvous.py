"""Lets processes meet before jax connects them, so that missing ones can be named.

When a process cannot reach jax's coordinator, or process 0 waits in vain for the
others, jax ends the whole process from C++ (SIGABRT and a stack trace, jax 0.10.2),
and Python cannot report what is wrong. Here process 0 first listens at the
coordinator's address until every other process has introduced itself; then all of
them continue to jax, at the same address. The connections stay, for `watch`.
"""

from __future__ import annotations

import contextlib
import socket
import time

from dualpipe_jax.processes.coordinator import LINGER_S

_RETRY_S = 0.2
_SETTLE_S = 2 * LINGER_S
_LINE_BYTES = 512
_GREETING = "dualpipe_jax"


def parse_address(address: str) -> tuple[str, int]:
    """Splits HOST:PORT; the host may be an IPv6 address in brackets.

    Raises:
      ValueError: it is not such an address.

    Examples:
      >>> parse_address("node-0.job:1234"), parse_address("[::1]:80")
      (('node-0.job', 1234), ('::1', 80))
    """
    host, colon, port = address.rpartition(":")
    bracketed = host[:1] == "[" and host[-1:] == "]"
    if bracketed:
        host = host[1:-1]
    if (
        not (colon and host and port.isascii() and port.isdigit())
        or not 0 < int(port) < 2**16
        or (":" in host and not bracketed)
        or any(c.isspace() or c == "/" for c in host)
    ):
        raise ValueError(
            f"coordinator {address!r} is not an address; give HOST:PORT, such as "
            "node-0:1234 or 127.0.0.1:1234."
        )
    return host, int(port)


def meet(
    address: str, num_processes: int, process_id: int, timeout: float
) -> dict[int, socket.socket]:
    """Returns when all processes have called this, at most `timeout` seconds apart.

    Returns:
      Of process 0, a connection with each other process; of another, with process 0.

    Raises:
      ValueError: some did not, or they do not agree about their number.
    """
    host, port = parse_address(address)
    deadline = time.monotonic() + timeout
    if num_processes == 1:
        return {}
    if process_id == 0:
        return _gather(port, num_processes, timeout, deadline)
    return {0: _report(host, port, num_processes, process_id, timeout, deadline)}


def _gather(
    port: int, num_processes: int, timeout: float, deadline: float
) -> dict[int, socket.socket]:
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(_listen(port, deadline))
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen at port {port} ({error}); choose a port that "
                "is free on its host."
            ) from error
        while True:
            # Some may have been killed while they waited, to be started again.
            here = {i: c for i, c in here.items() if not _has_left(c)}
            if len(here) == num_processes - 1:
                break
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, num_processes)) - here.keys())
                _tell(here, "error process 0 did not see all others in time")
                raise ValueError(
                    f"{len(missing)} of {num_processes} processes did not connect "
                    f"within {timeout:g} s, the first of them process {missing[0]}; "
                    "start them all, with this coordinator."
                ) from None
            stack.enter_context(connection)
            process_id, their_number = _introduced(connection)
            if process_id is None:
                continue  # a port scanner, say
            if their_number != num_processes:
                problem = (
                    f"process {process_id} was started as one of {their_number} "
                    f"processes, but process 0 as one of {num_processes}; give all the "
                    "same --num-processes."
                )
                _tell({process_id: connection, **here}, f"error {problem}")
                raise ValueError(problem)
            if process_id in here and not _has_left(here[process_id]):
                problem = (
                    f"two processes have --process-id {process_id}; give each its own."
                )
                _tell({-1: connection, **here}, f"error {problem}")
                raise ValueError(problem)
            here[process_id] = connection
        _tell(here, "go")
        # The stack closes the others.
        return {i: socket.socket(fileno=c.detach()) for i, c in here.items()}


def _report(
    host: str,
    port: int,
    num_processes: int,
    process_id: int,
    timeout: float,
    deadline: float,
) -> socket.socket:
    last = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as stack:
                connection = socket.create_connection((host, port), timeout=left)
                stack.enter_context(connection)
                greeting = f"{_GREETING} {process_id} {num_processes}\n"
                connection.sendall(greeting.encode())
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                answer = _read_line(connection)
                if answer == "go":
                    stack.pop_all()
                    return connection
        except OSError as error:
            last = str(error) or type(error).__name__
        else:
            kind, _, problem = answer.partition(" ")
            if kind == "error":
                raise ValueError(problem)
            last = "it closed the connection" if not answer else "it is another program"
        time.sleep(_RETRY_S)
    raise ValueError(
        f"coordinator {host}:{port} did not answer within {timeout:g} s ({last}); "
        "start process 0 there, and check --coordinator and the network."
    )


def _listen(port: int, deadline: float) -> socket.socket:
    """Listens at a port; waits where an earlier run's `coordinator` is just ending."""
    deadline = min(deadline, time.monotonic() + _SETTLE_S)
    while True:
        try:
            return _listen_now(port)
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_S)


def _listen_now(port: int) -> socket.socket:
    # As jax's service does: on all interfaces, of both kinds where there are both.
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
            )
    return socket.create_server(("", port), backlog=4096)


def _introduced(connection: socket.socket) -> tuple[int | None, int]:
    connection.settimeout(5)
    try:
        greeting, process_id, num_processes = _read_line(connection).split(" ")
        if greeting == _GREETING:
            return int(process_id), int(num_processes)
    except (OSError, ValueError):
        pass
    return None, 0


def _has_left(connection: socket.socket) -> bool:
    """Whether a process that waits for an answer has closed its connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5)


def _tell(connections: dict[int, socket.socket], line: str) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(f"{line}\n".encode())


def _read_line(connection: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n") and len(line) < _LINE_BYTES:
        received = connection.recv(1)
        if not received:
            break
        line += received
    return line.decode(errors="replace").strip()
