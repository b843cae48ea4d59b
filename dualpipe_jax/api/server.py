"""Serves an API on a port until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from dualpipe_jax.api.app import Api

_POLL_S = 0.05


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound, and does not listen yet.

    Args:
      host: the address to listen at.
      port: 0 chooses one that is free.

    Raises:
      ValueError: the port is in use, or the address is not of this machine.
    """
    with contextlib.ExitStack() as stack:
        try:
            if not 0 <= port < 2**16:
                raise OSError("ports are from 0 to 65535")
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            raise ValueError(
                f"cannot listen at {host}:{port}: {error.strerror or error}; choose "
                "another port or address."
            ) from error
        stack.pop_all()
        return bound


class Server(uvicorn.Server):
    """A server that finishes what runs and refuses what is new when it is told to end.

    Attributes:
      received: the signals that have told it to end.
      loop: the event loop that it runs in, once it does.
    """

    def __init__(
        self,
        api: Api,
        say: Callable[[str], Any] = print,
        *,
        grace_seconds: float = 600.0,
    ):
        """Makes a server; `run` serves.

        Args:
          api: what it serves.
          say: called with a line of text when it begins to end.
          grace_seconds: how long requests may run on then.
        """
        self._api, self._say, self._grace = api, say, grace_seconds
        self.received: list[str] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            api.app(self._stop),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            # A client that holds its connection open must not hold up the end.
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves in the running event loop."""
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begins to end; a second signal ends at once."""
        del frame
        self.received.append(signal.Signals(sig).name)
        if len(self.received) > 1:
            self._stop()
            self.force_exit = True
        elif self.loop is not None:
            self.loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Refuses new requests, and ends when those that run are finished."""
        self._api.is_draining = True
        self._say(
            f"{self.received[0] if self.received else 'told to end'}: "
            f"{self._api.worker.num_open} requests run on, new ones are refused"
        )
        self._draining = asyncio.create_task(self._wait_until_idle())

    async def _wait_until_idle(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace
        while self._api.worker.num_open and loop.time() < end:
            await asyncio.sleep(_POLL_S)
        self._stop()

    def _stop(self) -> None:
        self.should_exit = True


def serve(api: Api, bound: socket.socket, say: Callable[[str], Any] = print) -> int:
    """Serves until SIGTERM or SIGINT, and what runs is finished.

    Args:
      api: what to serve.
      bound: see `bind`.
      say: called with lines of text.

    Returns:
      The exit status: 1 if requests were left unfinished.

    Raises:
      BaseException: what ended the engine, if it has failed.
    """
    server = Server(api, say)
    server.run(sockets=[bound])
    if api.worker.failure is not None:
        raise api.worker.failure
    if api.worker.engine is not None:
        api.worker.close(timeout=60)
    return 1 if api.worker.num_open else 0
