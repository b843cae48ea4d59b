"""Prompts of `serve`: lines of text, or of JSON with options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dualpipe_jax.tokens import Tokenizer

OPTIONS = ("max_tokens", "temperature", "seed", "top_p")


class Prompt(NamedTuple):
    """A prompt as the engine takes it.

    Attributes:
      options: for `Engine.submit`, the tokens among them.
      shown: what is written before the completion.
    """

    options: dict[str, Any]
    shown: str


def read_prompts(
    lines: Iterable[str],
    tokenizer: Tokenizer,
    defaults: dict[str, Any],
    name: str,
    *,
    is_chat: bool = False,
) -> Iterator[Prompt | ValueError]:
    """Yields each line's prompt, or an error about the line.

    Args:
      lines: bytes of theirs that are not UTF-8 are surrogates.
      tokenizer: of the model.
      defaults: of the options.
      name: of the file; lines of `.jsonl` are objects.
      is_chat: whether a prompt is a user's message, for the chat template.
    """
    for line in lines:
        text = line.rstrip("\n")
        if not text:
            continue
        try:
            text.encode("utf-8", "surrogateescape").decode("utf-8")
            found: dict[str, Any] = {"prompt": text}
            if name.endswith(".jsonl"):
                found = _read_object(text)
            yield _prompt(found, tokenizer, defaults, is_chat)
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            yield ValueError(f"{text[:40]!r} is not UTF-8 ({error.reason}).")
        except ValueError as error:
            yield error
        except RecursionError:
            yield ValueError(f"{text[:40]!r} is nested too deeply.")


def _prompt(
    found: dict[str, Any], tokenizer: Tokenizer, defaults: dict[str, Any], is_chat: bool
) -> Prompt:
    options = defaults | {name: found[name] for name in OPTIONS if name in found}
    messages = found.get("messages")
    if messages is None and is_chat:
        messages = [{"role": "user", "content": found["prompt"]}]
    if messages is not None:
        tokens = tokenizer.encode_chat(messages)
        return Prompt(options | {"prompt": tokens}, "")
    tokens = tokenizer.encode(found["prompt"])
    return Prompt(options | {"prompt": tokens}, tokenizer.decode(tokens))


def _read_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text[:60]!r} is not JSON ({error}).") from error
    given = found if isinstance(found, dict) else {}
    has_prompt = isinstance(given.get("prompt"), str)
    if has_prompt == (given.get("messages") is not None):
        raise ValueError(
            f'{text[:60]!r} must be an object with "prompt": "..." or "messages": '
            "[...]."
        )
    if unknown := given.keys() - {"prompt", "messages", *OPTIONS}:
        raise ValueError(
            f"{sorted(unknown)[0]!r} is unknown; use prompt or messages, "
            f"{', '.join(OPTIONS)}."
        )
    for option in OPTIONS:
        kinds = (int, float) if option in ("temperature", "top_p") else (int,)
        if option in given and type(given[option]) not in kinds:
            raise ValueError(f"{option}={given[option]!r} must be a number.")
    return given
