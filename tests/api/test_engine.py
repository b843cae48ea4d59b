"""The real engine behind HTTP, asked by many clients at once."""

import asyncio
import gc
import json
import random

import httpx
import openai
import pytest

from dualpipe_jax.api import Limits
from tests.api import running
from tests.deepseek.serve import small_server

# Programs of eight devices, compiled as in tests/deepseek/serve.
pytestmark = [pytest.mark.slow, pytest.mark.as_users]

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def served(tokenizer):
    engine = running.engine()
    limits = Limits(max_waiting=1000, max_body_bytes=10_000)
    with running.running(lambda: engine, tokenizer, limits=limits) as (_, api, url):
        running.wait_until(lambda: api.worker.engine is not None)
        yield engine, api, url


@pytest.fixture(scope="module")
def expected(served):
    """Prompts, and what the engine completes them with when it is asked directly."""
    engine, *_ = served
    config = engine.config
    prompts = [prompt.tolist() for prompt in small_server.prompts(24, config, seed=1)]
    warm = {"temperature": 0.8, "seed": 5, "top_p": 0.9}

    def complete(**options):
        completed = engine.generate(prompts, max_tokens=MAX_TOKENS, **options)
        return [each.tolist() for each in completed]

    return prompts, warm, (complete(), complete(**warm))


def measured(url):
    """Samples of /metrics; the engine's own functions are its thread's alone."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def is_idle(api, url):
    samples = measured(url)
    return (
        api.worker.num_open == samples["eplb_running"] == samples["eplb_waiting"] == 0
    )


async def stream(client, prompt, **options):
    events = await client.completions.create(
        model=running.MODEL,
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        stream=True,
        **options,
    )
    return "".join([event.choices[0].text async for event in events])


def test_sixty_four_clients_with_cancels_and_bad_requests_among_them(
    served, expected, tokenizer
):
    _, api, url = served
    prompts, warm, (greedy, drawn) = expected
    rng = random.Random(0)

    async def good(client, number):
        at = number % len(prompts)
        is_warm = number % 3 == 0
        options = warm if is_warm else {"temperature": 0}
        tokens = (drawn if is_warm else greedy)[at]
        stops = tokenizer.stop_tokens
        ends = [i for i, token in enumerate(tokens) if token in stops]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        text = await stream(client, prompts[at], **options)
        assert text == tokenizer.decode(tokens)

    async def cancelled(number):
        fields = {"model": running.MODEL, "prompt": prompts[number % 24]}
        fields |= {"max_tokens": 200, "stream": number % 2 == 0}
        timeout = httpx.Timeout(30, read=rng.uniform(0.01, 0.3))
        async with httpx.AsyncClient(timeout=timeout) as client:
            try:
                async with client.stream(
                    "POST", f"{url}/v1/completions", json=fields
                ) as answer:
                    async for _ in answer.aiter_bytes():
                        if rng.random() < 0.3:
                            break
            except httpx.ReadTimeout:
                pass

    async def bad(client, number):
        options = [{"prompt": [99]}, {"prompt": [1] * 50}, {"temperature": -1}]
        with pytest.raises(openai.BadRequestError):
            await stream(client, **{"prompt": [1]} | options[number % 3])

    async def one(client, number):
        for turn in range(3):
            await good(client, number + turn)
            if number % 4 == 0:
                await cancelled(number + turn)
            if number % 4 == 1:
                await bad(client, number + turn)

    async def everyone():
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120
        ) as client:
            await asyncio.gather(*(one(client, number) for number in range(64)))

    asyncio.run(everyone())
    running.wait_until(lambda: is_idle(api, url))
    assert measured(url)["eplb_moves_total"] > 0


def test_nothing_leaks(served, expected):
    """Objects after 100 requests, and after 1,000 more."""
    _, api, url = served
    prompts, *_ = expected
    counts = []

    async def ask(client, number):
        fields = {"model": running.MODEL, "prompt": prompts[number % 24], "n": 2}
        fields |= {"max_tokens": 2, "stream": number % 2 == 0}
        answer = await client.post(f"{url}/v1/completions", json=fields)
        assert answer.status_code == 200
        if number % 2:
            assert json.loads(answer.content)["usage"]["completion_tokens"] >= 2

    async def many(total):
        async with httpx.AsyncClient(timeout=120) as client:
            for start in range(0, total, 50):
                await asyncio.gather(*(ask(client, start + i) for i in range(50)))

    for total in (100, 1000):
        asyncio.run(many(total))
        running.wait_until(lambda: is_idle(api, url))
        gc.unfreeze()
        gc.collect()
        counts.append(len(gc.get_objects()))
    before, after = counts
    assert after - before < 500  # not even one object for two requests
