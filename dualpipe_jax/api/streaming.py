"""Streams of server-sent events, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dualpipe_jax.api.errors import ApiError
from dualpipe_jax.api.generating import Completions


class Events(Response):
    """A stream of events, which ends the request when its client goes away."""

    def __init__(self, completions: Completions, num_choices: int, has_usage: bool):
        """Makes a stream.

        Args:
          completions: of the request.
          num_choices: completions.
          has_usage: whether the numbers of tokens are sent at the end.
        """
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        del self.headers["content-length"]
        self._completions = completions
        self._num_choices, self._has_usage = num_choices, has_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        answer = self._completions.answer

        async def write(content: bytes, is_last: bool = False) -> None:
            await send(
                {
                    "type": "http.response.body",
                    "body": content,
                    "more_body": not is_last,
                }
            )

        with self._completions:
            async with watched(self._completions, receive):
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                try:
                    if start := answer.start(self._num_choices):
                        await write(start)
                    async for piece in self._completions.pieces():
                        await write(answer.event(piece))
                    await write(answer.end(self._has_usage), is_last=True)
                except _GoneError:
                    return
                except ApiError as error:
                    content = json.dumps(error.content())
                    await write(f"data: {content}\n\n".encode(), is_last=True)


class _GoneError(ApiError):
    """The client has closed the connection."""


@contextlib.asynccontextmanager
async def watched(completions: Completions, receive: Receive) -> AsyncIterator[None]:
    """Fails the completions when the client goes away."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        completions.fail(_GoneError(499, "The client has closed the connection."))

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
