"""A small model behind HTTP, in this process, on a free port."""

import asyncio
import contextlib
import threading

from dualpipe_jax.api import Api, Server, bind
from tests.deepseek.serve import small_server
from tests.tokens.small import small_tokenizer

MODEL = "small/model"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [
    "<end>",
    *LETTERS,
    "<user>",
    "<model>",
    ".",
    " ",
    "\n",
]  # as many as the model's
TEMPLATE = "{% for each in messages %}{{ each.content }}.{% endfor %}"


def tokenizer_in(folder):
    tokenizer = small_tokenizer(folder, TOKENS)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer


@contextlib.contextmanager
def running(start, tokenizer, **options):
    """Yields a server and its URL; `start` makes the engine."""
    api = Api(start, tokenizer, MODEL, **options)
    bound = bind("127.0.0.1", 0)
    server = Server(api, say=lambda text: None)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
    thread.start()
    try:
        yield server, api, f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        if api.worker.engine is not None and api.worker.failure is None:
            api.worker.close(30)


def engine():
    """An engine with few tokens to a prompt, whose experts move often."""
    return small_server.engine(small_server.config())


def wait_until(condition, seconds=30):
    async def wait():
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)

    asyncio.run(wait())
