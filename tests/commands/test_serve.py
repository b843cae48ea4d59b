"""`serve`: prompts and options that are refused, and how it ends when it is told to."""

import argparse
import dataclasses
import functools
import io
import json
import os
import shutil

import pytest

from dualpipe_jax.commands import main as cli, serve
from dualpipe_jax.commands.prompts import read_prompts
from dualpipe_jax.configs import tiny_server
from dualpipe_jax.deepseek.serve import Token
from dualpipe_jax.tokens import ByteTokenizer, NumberTokenizer, PublishedTokenizer
from tests.tokens.small import small_tokenizer

CONFIG = tiny_server.config()
BYTES = ByteTokenizer()
DEFAULTS = {"max_tokens": 4, "temperature": 0.0, "seed": 0, "top_p": 1.0}


def found_in(path):
    with serve._opened(str(path)) as file:
        found = list(read_prompts(file, BYTES, DEFAULTS, str(path)))
    return [each if isinstance(each, ValueError) else each.options for each in found]


def test_an_invalid_byte_refuses_its_own_prompt_only(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"one\n\n\xffbad\ncaf\xc3\xa9\n")
    one, bad, last = found_in(path)
    assert one == DEFAULTS | {"prompt": list(b"one")}
    assert str(bad) == r"'\udcffbad' is not UTF-8 (invalid start byte)."
    assert last == DEFAULTS | {"prompt": list(b"caf\xc3\xa9")}


def test_bad_lines_of_json_are_refused_one_by_one(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": "a", "max_tokens": true}',
        b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        json.dumps({"prompt": "fine", "seed": 7}).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    *refused, fine = found_in(path)
    for error, message in zip(
        refused,
        ("surrogates not allowed", "invalid start", "too deeply", "max_tokens", ""),
        strict=True,
    ):
        assert isinstance(error, ValueError) and message in str(error)
        assert "\n" not in str(error) and len(str(error)) < 200
    assert fine == DEFAULTS | {"prompt": list(b"fine"), "seed": 7}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--temperature=nan", "temperature=nan must be a finite number, at least 0"),
        ("--temperature=-1", "temperature=-1.0 must be a finite number"),
        ("--temperature=1e39", "temperature=1e+39 must be a finite number"),
        ("--top-p=0", "top_p=0.0 must be a number above 0, at most 1"),
        ("--top-p=1.5", "top_p=1.5 must be a number above 0, at most 1"),
        (f"--seed={2**31}", "seed=2147483648 must be an integer from 0 to 2^31 - 1"),
        ("--max-tokens=0", "max_tokens=0 must be an integer, at least 1"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(option, message, capsys):
    assert cli.main(["serve", "tiny_server", "--run", "nowhere", option]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def recited(received=None, after=0):
    """Yields four tokens of three requests each, two at a time, as an engine does."""
    for number, running in enumerate([(0, 1)] * 4 + [(2,)] * 4):
        if received is not None and number == after:
            received.append("SIGTERM")
        for request in running:
            yield Token(request, ord("abc"[request]), number % 4 == 3)


TEXTS = {0: "0:", 1: "1:", 2: "2:"}


def test_what_a_signal_leaves_is_said():
    out = io.StringIO()
    assert serve.stream(recited(), BYTES, TEXTS, out) == []
    assert out.getvalue() == "0:aaaa\n1:bbbb\n2:cccc\n"
    for after, text, left in (
        (0, "0:a\n", [0, 1, 2]),
        (3, "0:aaaa\n1:bbb\n", [1, 2]),
        (5, "0:aaaa\n1:bbbb\n2:cc\n", [2]),
    ):
        out, received = io.StringIO(), []
        tokens = recited(received, after)
        assert serve.stream(tokens, BYTES, TEXTS, out, received) == left
        assert out.getvalue() == text


def test_a_closed_pipe_ends_the_stream():
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), os.fdopen(writer, "w") as out:
        serve.stream(recited(), BYTES, TEXTS, out)  # `main` then ends quietly


@pytest.fixture
def tokenizer(tmp_path):
    tokens = ["<end>", "<user>", "<model>", "a", "b", "\u2581c"]
    folder = tmp_path / "tokenizer"
    small_tokenizer(folder, tokens)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<model>"
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    described = json.loads((folder / "tokenizer.json").read_text())
    for number in (1, 2):
        special = described["added_tokens"][0]
        special = special | {"id": number, "content": tokens[number]}
        described["added_tokens"].append(special)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def chosen(vocab_size=256, **given):
    sizes = dataclasses.replace(CONFIG.architecture, vocab_size=vocab_size)
    config = dataclasses.replace(CONFIG, architecture=sizes)
    arguments = {"run": None, "pretrained": None, "tokenizer": None, "chat": False}
    return serve.choose_tokenizer(config, argparse.Namespace(**arguments | given))


def test_the_tokenizer_is_the_models_own(tokenizer, tmp_path):
    nothing = tmp_path / "nothing"
    assert isinstance(chosen(run=nothing), ByteTokenizer)
    assert isinstance(chosen(300, pretrained=nothing), NumberTokenizer)
    digest = PublishedTokenizer(tokenizer).digest
    shutil.copytree(tokenizer, tmp_path / "run" / "tokenizer")
    for given in (
        {"tokenizer": tokenizer, "run": nothing},
        {"pretrained": tokenizer},
        {"run": tmp_path / "run", "chat": True},
    ):
        assert chosen(**given).digest == digest
    with pytest.raises(ValueError, match="has 6 tokens, but the model's vocab_size"):
        chosen(5, pretrained=tokenizer)
    with pytest.raises(ValueError, match="there is no chat template"):
        chosen(run=nothing, chat=True)


def test_messages_are_prompts_by_the_chat_template(tokenizer):
    tokenizer = PublishedTokenizer(tokenizer)
    read = functools.partial(read_prompts, tokenizer=tokenizer, defaults=DEFAULTS)
    (line,) = read(["ab\n"], name="-", is_chat=True)
    assert line.options["prompt"] == [1, 3, 4, 2] and line.shown == ""
    (plain,) = read(["ab\n"], name="-")
    assert plain.options["prompt"] == [3, 4] and plain.shown == "ab"
    messages = [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]
    objects = [
        {"messages": messages, "seed": 3},
        {"messages": messages, "prompt": "a"},
        {"messages": [{"role": "user"}]},
        {"messages": []},
        {},
    ]
    chat, both, part, none, empty = read(map(json.dumps, objects), name="a.jsonl")
    assert chat.options == DEFAULTS | {"prompt": [1, 3, 2, 4, 2], "seed": 3}
    for error in (both, empty):
        assert '"prompt": "..." or "messages": [...]' in str(error)
    for error in (part, none):
        assert "must be a list of objects with role and content" in str(error)


def test_the_token_that_ends_a_reply_is_not_written(tokenizer):
    tokens = [Token(0, 3, False), Token(0, 5, False), Token(0, 0, True)]
    out = io.StringIO()
    serve.stream(tokens, PublishedTokenizer(tokenizer), {0: ""}, out)
    assert out.getvalue() == "a\u2581c\n"
