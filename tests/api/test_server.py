"""A server's life: loading, the key, the time limit, faults, and how it ends."""

import threading
import time

import httpx
import openai
import pytest

from dualpipe_jax.api import Limits, bind
from tests.api import running
from tests.api.recited import RecitingEngine

FIELDS = {"model": running.MODEL, "prompt": "a", "max_tokens": 3}


def post(url, **changes):
    return httpx.post(f"{url}/v1/completions", json=FIELDS | changes, timeout=30)


def test_while_it_loads(tokenizer):
    loaded = threading.Event()

    def start():
        loaded.wait(30)
        return RecitingEngine()

    with running.running(start, tokenizer) as (_, api, url):
        wait_for_port(url)
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 503
        answer = post(url)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "loading"
        assert "eplb_answers_total" in httpx.get(f"{url}/metrics").text
        loaded.set()
        running.wait_until(lambda: api.worker.engine is not None)
        assert httpx.get(f"{url}/ready").status_code == 200
        assert post(url).json()["choices"][0]["text"] == "abc"


def wait_for_port(url):
    for _ in range(500):
        try:
            httpx.get(f"{url}/health")
        except httpx.ConnectError:
            time.sleep(0.01)
        else:
            return
    raise TimeoutError(url)


def test_a_key(tokenizer):
    with running.running(RecitingEngine, tokenizer, api_key="secret") as (_, api, url):
        wait_for_port(url)
        running.wait_until(lambda: api.worker.engine is not None)
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}):
            for path in ("/v1/models", "/metrics"):
                answer = httpx.get(url + path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert client.models.list().data[0].id == running.MODEL


def test_a_request_that_takes_too_long(tokenizer):
    engine = RecitingEngine()
    limits = Limits(max_seconds=0.2)
    with running.running(lambda: engine, tokenizer, limits=limits) as (_, api, url):
        wait_for_port(url)
        running.wait_until(lambda: api.worker.engine is not None)
        engine.gate.clear()
        answer = post(url)
        assert answer.status_code == 504
        assert "longer than 0.2 seconds" in answer.json()["error"]["message"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            events = client.completions.create(**FIELDS, stream=True)
            with pytest.raises(openai.APIError, match="longer than"):
                list(events)
        engine.gate.set()
        running.wait_until(lambda: api.worker.num_open == 0 and engine.num_left == 0)
        assert post(url).status_code == 200


def test_an_engine_that_fails(tokenizer):
    engine = RecitingEngine()
    with running.running(lambda: engine, tokenizer) as (server, api, url):
        wait_for_port(url)
        running.wait_until(lambda: api.worker.engine is not None)
        engine.gate.clear()
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(post(url))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        running.wait_until(lambda: api.worker.num_open == 3)
        engine.fault = RuntimeError("a device is lost")
        engine.gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [503] * 3
        running.wait_until(lambda: server.should_exit)
        assert api.worker.failure is engine.fault and api.worker.num_open == 0


def test_the_end(tokenizer):
    """What runs is finished; what is new is refused, in one form until the last."""
    engine = RecitingEngine()
    with running.running(lambda: engine, tokenizer) as (server, api, url):
        wait_for_port(url)
        running.wait_until(lambda: api.worker.engine is not None)
        engine.gate.clear()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            events = client.completions.create(**FIELDS, stream=True)
            running.wait_until(lambda: api.worker.num_open == 1)
            server.handle_exit(15, None)
            running.wait_until(lambda: api.is_draining)
            for path in ("/ready", "/v1/completions"):
                method = "GET" if path == "/ready" else "POST"
                answer = httpx.request(method, url + path, json=FIELDS)
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "shutting_down"
            assert httpx.get(f"{url}/health").status_code == 200
            assert not server.should_exit
            engine.gate.set()
            assert "".join(event.choices[0].text for event in events) == "abc"
        running.wait_until(lambda: server.should_exit)
    with pytest.raises(httpx.ConnectError):
        post(url)
    assert server.received == ["SIGTERM"]


def test_ports_that_cannot_be_had():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"127.0.0.1:{port}: Address already in use"
        ):
            bind("127.0.0.1", port)
    with pytest.raises(ValueError, match="choose another port or address"):
        bind("192.0.2.1", 0)
    with pytest.raises(ValueError, match=r"cannot listen at 127\.0\.0\.1:70000"):
        bind("127.0.0.1", 70000)
