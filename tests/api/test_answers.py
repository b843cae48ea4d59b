"""Completions and chats by OpenAI's own client, and what it is refused."""

import contextlib
import json
import threading

import httpx
import openai
import pytest

from dualpipe_jax.api import Limits
from tests.api import running
from tests.api.recited import RecitingEngine

MODEL = running.MODEL
LIMITS = Limits(max_waiting=2, max_body_bytes=10_000, max_choices=8, max_seconds=20)


@pytest.fixture(scope="module")
def served(tokenizer):
    engine = RecitingEngine()
    with running.running(lambda: engine, tokenizer, limits=LIMITS) as (
        _,
        api,
        url,
    ):
        running.wait_until(lambda: api.worker.engine is not None)
        yield engine, api, url


@pytest.fixture
def engine(served):
    engine, api, _ = served
    yield engine
    engine.gate.set()
    running.wait_until(lambda: api.worker.num_open == 0 and engine.num_left == 0)


@pytest.fixture(scope="module")
def url(served):
    return served[2]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, prompt="xab", **options):
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def chat(client, content="ab", **options):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_a_completion(client, engine):
    answer = complete(client, max_tokens=5)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("bcdef", "length", 0)
    assert answer.object == "text_completion" and answer.model == MODEL
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        3,
        5,
        8,
    )
    # OpenAI's defaults.
    assert complete(client).choices[0].text == "bcdefghijklmnopq"  # 16 tokens
    assert engine.submitted[-1]["temperature"] == engine.submitted[-1]["top_p"] == 1.0


def test_a_chat(client, engine):
    answer = chat(client, "ab", max_completion_tokens=3, temperature=0.5, top_p=0.9)
    [choice] = answer.choices
    # The template ends with a full stop, whose token is not a letter's.
    assert choice.message.role == "assistant" and len(choice.message.content) == 3
    assert answer.object == "chat.completion"
    submitted = engine.submitted[-1]
    assert (submitted["temperature"], submitted["top_p"]) == (0.5, 0.9)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(client, parts, max_tokens=3).choices == answer.choices
    # Without a limit, a reply may fill the context.
    chat(client, "ab")
    assert engine.submitted[-1]["max_tokens"] == engine.config.context_length - 3


def test_streams(client, engine):
    events = list(complete(client, max_tokens=4, stream=True))
    assert [event.choices[0].text for event in events] == ["b", "c", "d", "e"]
    assert [event.choices[0].finish_reason for event in events] == [None] * 3 + [
        "length"
    ]
    options = {"include_usage": True}
    *events, last = chat(client, max_tokens=2, stream=True, stream_options=options)
    deltas = [event.choices[0].delta for event in events]
    assert deltas[0].role == "assistant" and deltas[0].content == ""
    assert len("".join(delta.content or "" for delta in deltas)) == 2
    assert events[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == 2
    assert len({event.id for event in [*events, last]}) == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_stops_are_found_wherever_tokens_end(client, engine, is_stream):
    for stop, text in (
        ("ef", "bcd"),
        (["x", "d"], "bc"),
        (["zz"], "bcdefghij"),
        ("b", ""),
    ):
        answer = complete(client, max_tokens=9, stop=stop, stream=is_stream)
        events = list(answer) if is_stream else [answer]
        assert "".join(event.choices[0].text for event in events) == text
        reason = "length" if stop == ["zz"] else "stop"
        assert events[-1].choices[0].finish_reason == reason
    # What runs on when a stop is found is ended: nothing is left (see the fixture).
    complete(client, max_tokens=200, stop="d")


def test_several_prompts_and_several_choices(client, engine):
    answer = complete(client, ["xab", "xq"], n=2, max_tokens=2, seed=7)
    texts = [(each.index, each.text) for each in answer.choices]
    assert texts == [(0, "bc"), (1, "bc"), (2, "qr"), (3, "qr")]
    assert answer.usage.prompt_tokens == 5 and answer.usage.completion_tokens == 8
    # The draws of choices differ, and a seed fixes them.
    assert [each["seed"] for each in engine.submitted[-4:]] == [7, 8, 7, 8]
    complete(client, n=2, max_tokens=1)
    one, other = (each["seed"] for each in engine.submitted[-2:])
    assert other == one + 1
    assert complete(client, [[1, 2], [3]], max_tokens=1).choices[1].text == "c"
    assert complete(client, [24, 5], max_tokens=1).choices[0].text == "e"
    events = complete(client, n=3, max_tokens=2, stream=True)
    assert sorted(event.choices[0].index for event in events) == [0, 0, 1, 1, 2, 2]


def test_log_probabilities(client, engine):
    logprobs = complete(client, max_tokens=3, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["b", "c", "d"] and logprobs.text_offset == [0, 1, 2]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs[0] == {"b": -0.5, "c": -1.5}
    content = (
        chat(client, max_tokens=2, logprobs=True, top_logprobs=1).choices[0].logprobs
    )
    assert len(content.content) == 2
    first = content.content[0]
    assert first.logprob == -0.5 and first.bytes == [*first.token.encode()]
    assert first.top_logprobs[0].token == first.token
    assert chat(client, max_tokens=1).choices[0].logprobs is None
    # In a stream, tokens whose text is held back come with the next piece.
    events = list(complete(client, max_tokens=3, logprobs=0, stop="cx", stream=True))
    assert [event.choices[0].logprobs.tokens for event in events] == [["b"], ["c", "d"]]
    assert [event.choices[0].logprobs.text_offset for event in events] == [[0], [1, 2]]


def test_models(client):
    [model] = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt must be a text, a list of texts"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": ["a", 1]}, "prompt", "prompt must be a text"),
        ({"prompt": [1, 99]}, "prompt", "prompt holds tokens from 1 to 99"),
        ({"prompt": [1, True]}, "prompt", "prompt must be a text"),
        (
            {"prompt": "a" * 101},
            "prompt",
            "prompt has 101 tokens, but max_prompt_length",
        ),
        ({"prompt": "\ud800"}, "prompt", "prompt: "),
        (
            {"max_tokens": 0},
            "max_tokens",
            "max_tokens=0 must be an integer, at least 1",
        ),
        ({"max_tokens": 999}, "max_tokens", "do not fit context_length=224"),
        ({"max_tokens": "3"}, "max_tokens", "max_tokens='3' must be an integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens=True must be an integer"),
        ({"temperature": -1}, "temperature", "temperature=-1 must be a finite number"),
        ({"temperature": "hot"}, "temperature", "temperature='hot' must be a number"),
        ({"top_p": 0}, "top_p", "top_p=0 must be a number above 0"),
        ({"seed": -1}, "seed", "seed=-1 must be an integer from 0"),
        ({"seed": 0.5}, "seed", "seed=0.5 must be an integer"),
        (
            {"logprobs": 21},
            "logprobs",
            "num_logprobs=21 must be an integer from 0 to 20",
        ),
        ({"n": 0}, "n", "n=0 must be at least 1"),
        ({"n": 9}, "n", "at most 8 completions"),
        ({"prompt": ["a"] * 5, "n": 2}, "n", "5 prompts with n completions each"),
        ({"stop": ["a"] * 5}, "stop", "stop must be a text or at most 4 texts"),
        ({"stop": [1]}, "stop", "stop must be a text or at most 4 texts"),
        ({"stream": 1}, "stream", "stream=1 must be true or false"),
        ({"stream_options": 1}, "stream_options", "stream_options must be an object"),
        ({"echo": True}, "echo", "echo is not supported; leave it out"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
        ({"model": "another"}, "model", "The model 'another' is not served"),
        ({"model": None}, "model", "model must be a model's name"),
    ],
)
def test_what_is_refused(changes, param, message, url, engine):
    fields = {"model": MODEL, "prompt": "ab", "max_tokens": 2} | changes
    answer = httpx.post(f"{url}/v1/completions", content=json.dumps(fields))
    error = answer.json()["error"]
    assert answer.status_code == (404 if changes.get("model") else 400)
    assert message in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": "hello"}, "messages must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "messages: content must be a text"),
        ({"messages": ["hello"]}, "messages: each must be an object with role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages: only texts are supported",
        ),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
        ({"tools": [{}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supp"),
    ],
)
def test_what_a_chat_is_refused(changes, message, url, engine):
    fields = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]} | changes
    answer = httpx.post(f"{url}/v1/chat/completions", json=fields)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_unknown_and_empty_fields_are_ignored(url, engine):
    fields = {"model": MODEL, "prompt": "a", "max_tokens": 1, "user": "me", "frob": [1]}
    fields |= dict.fromkeys(["stop", "n", "seed", "logprobs", "suffix", "stream"])
    answer = httpx.post(f"{url}/v1/completions", json=fields)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == "a"


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "The body is not JSON"),
        (b"{", 400, "The body is not JSON"),
        (b"\xff\xfe", 400, "The body is not JSON"),
        (b"[1]", 400, "The body must be a JSON object"),
        (b'{"prompt": ' + b"[" * 5000, 400, "nested too deeply"),
        (b'{"prompt": "' + b"a" * 10_000, 413, "more than 10000 bytes"),
    ],
)
def test_bodies_that_are_refused(content, status, message, url, engine):
    answer = httpx.post(f"{url}/v1/completions", content=content)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_routes_that_do_not_exist(url):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status
        assert f"{method} {path}: " in answer.json()["error"]["message"]


def test_a_full_queue_refuses_more(client, engine, served):
    _, api, _ = served
    engine.gate.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(6):  # four run, two wait
            answer = complete(client, max_tokens=2, stream=True)
            stack.enter_context(answer)
        with pytest.raises(openai.RateLimitError, match="6 requests run or wait"):
            complete(client, max_tokens=2)
        with pytest.raises(openai.RateLimitError):
            complete(client, n=2, max_tokens=2)
        assert api.worker.num_open == 6
        engine.gate.set()
    running.wait_until(lambda: api.worker.num_open == 0)
    assert complete(client, max_tokens=2).choices[0].text == "bc"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(client, engine, served, is_stream):
    _, api, url = served
    fields = {"model": MODEL, "prompt": "a", "max_tokens": 200, "stream": is_stream}
    timeout = httpx.Timeout(10, read=0.05)
    engine.gate.clear()
    with (
        httpx.Client(timeout=timeout) as other,
        contextlib.suppress(httpx.ReadTimeout),
        other.stream("POST", f"{url}/v1/completions", json=fields) as answer,
    ):
        answer.read()
    running.wait_until(lambda: api.worker.num_open == 0)
    engine.gate.set()
    running.wait_until(lambda: engine.num_left == 0)


def test_metrics(client, engine, url):
    complete(client, max_tokens=3)
    text = httpx.get(f"{url}/metrics").text
    lines = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")
    )
    assert int(lines["eplb_time_to_first_token_seconds_count"]) > 0
    assert int(lines["eplb_time_between_tokens_seconds_count"]) > 1
    assert int(lines['eplb_time_to_first_token_seconds_bucket{le="+Inf"}']) == int(
        lines["eplb_time_to_first_token_seconds_count"]
    )
    assert int(lines['eplb_answers_total{code="200"}']) > 0
    assert float(lines["eplb_running"]) == 0
    assert float(lines['eplb_layer_balancedness{layer="0"}']) == 0.5
    assert float(lines['eplb_device_load{layer="1",device="1"}']) == 1
    # Every sample has a type, which is given once.
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


def test_many_clients_at_once(url, engine):
    """Each gets its own letters, whatever the others do."""
    errors = []

    def ask(number):
        letter = running.LETTERS[number % 26]
        fields = {"model": MODEL, "prompt": letter, "max_tokens": 3}
        try:
            while True:
                answer = httpx.post(f"{url}/v1/completions", json=fields, timeout=60)
                if answer.status_code != 429:
                    break
            start = running.LETTERS.index(letter)
            expected = (running.LETTERS * 2)[start : start + 3]
            assert answer.json()["choices"][0]["text"] == expected
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
