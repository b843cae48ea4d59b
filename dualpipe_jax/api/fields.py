"""The fields of a request's JSON: read, checked, and turned into engine requests.

Unknown fields are ignored, as OpenAI's API does. Known ones that would change the
result, and are not implemented, are refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dualpipe_jax.api.errors import ApiError
from dualpipe_jax.tokens import Tokenizer

MAX_STOPS = 4
# Fields that are not implemented, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a request asks for.

    Attributes:
      prompts: tokens of each prompt.
      num_choices: completions of each prompt.
      max_tokens: None: as many as fit.
      temperature: see `Engine.submit`, as the next two.
      top_p: see above.
      num_logprobs: see above.
      seed: None: a random one.
      stops: texts that end a completion; they are not part of it.
      is_stream: whether tokens are sent as they come.
      has_usage: whether a stream ends with the numbers of tokens.
    """

    prompts: tuple[Sequence[int], ...]
    num_choices: int
    max_tokens: int | None
    temperature: float
    top_p: float
    num_logprobs: int | None
    seed: int | None
    stops: tuple[str, ...]
    is_stream: bool
    has_usage: bool


def parse_json(body: bytes) -> Mapping[str, Any]:
    """Returns the object of a body.

    Raises:
      ApiError: it is no JSON, or no object.
    """
    try:
        fields = json.loads(body)
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return fields


def read_generation(
    fields: Mapping[str, Any], tokenizer: Tokenizer, max_choices: int, *, is_chat: bool
) -> Generation:
    """Reads what a request asks for; the engine checks ranges.

    Args:
      fields: of the request.
      tokenizer: of the model.
      max_choices: most completions of one request.
      is_chat: whether it has messages, not prompts.

    Raises:
      ApiError: naming the field that is wrong.
    """
    for name, neutral in _NEUTRAL.items():
        if fields.get(name) not in (None, *neutral):
            raise ApiError(
                400,
                f"{name} is not supported; leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    prompts = (
        [_chat_prompt(fields, tokenizer)] if is_chat else _prompts(fields, tokenizer)
    )
    num_choices = _number(fields, "n", int, 1)
    if not 1 <= num_choices <= max_choices // len(prompts):
        raise ApiError(
            400,
            f"n={num_choices} must be at least 1, and {len(prompts)} prompts with n "
            f"completions each at most {max_choices} completions.",
            param="n",
        )
    names = ("max_completion_tokens", "max_tokens") if is_chat else ("max_tokens",)
    given = [_number(fields, name, int, None) for name in names]
    max_tokens = next((each for each in given if each is not None), None)
    options = _object(fields, "stream_options")
    return Generation(
        prompts=tuple(prompts),
        num_choices=num_choices,
        # 16 as OpenAI's API; a reply in a chat may fill the context.
        max_tokens=max_tokens if max_tokens is not None or is_chat else 16,
        temperature=_number(fields, "temperature", float, 1.0),
        top_p=_number(fields, "top_p", float, 1.0),
        num_logprobs=_num_logprobs(fields, is_chat),
        seed=_number(fields, "seed", int, None),
        stops=_stops(fields),
        is_stream=_flag(fields, "stream"),
        has_usage=_flag(options, "include_usage"),
    )


def _prompts(fields: Mapping[str, Any], tokenizer: Tokenizer) -> list[Sequence[int]]:
    """Returns the tokens of a text, of several, or of tokens given as numbers."""
    prompt = fields.get("prompt")
    many = prompt if isinstance(prompt, list) else [prompt]
    if not many:
        raise ApiError(400, "prompt is empty.", param="prompt")
    if all(type(each) is int for each in many):
        many = [many]
    return [_tokens(each, tokenizer) for each in many]


def _tokens(prompt: Any, tokenizer: Tokenizer) -> Sequence[int]:
    if isinstance(prompt, str):
        try:
            return tokenizer.encode(prompt)
        except ValueError as error:  # surrogates among them
            raise ApiError(400, f"prompt: {error}", param="prompt") from None
    if isinstance(prompt, list) and all(type(each) is int for each in prompt):
        return prompt
    raise ApiError(
        400,
        "prompt must be a text, a list of texts, a list of tokens, or a list of lists "
        "of tokens.",
        param="prompt",
    )


def _chat_prompt(fields: Mapping[str, Any], tokenizer: Tokenizer) -> Sequence[int]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of messages.", param="messages")
    try:
        return tokenizer.encode_chat([_message(each) for each in messages])
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("each must be an object with role and content.")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(content):
            raise ValueError("only texts are supported as parts of a content.")
        content = "".join(texts)
    if not isinstance(content, str):
        raise ValueError("content must be a text.")
    return {"role": message["role"], "content": content}


def _num_logprobs(fields: Mapping[str, Any], is_chat: bool) -> int | None:
    if not is_chat:
        return _number(fields, "logprobs", int, None)
    number = _number(fields, "top_logprobs", int, None)
    if _flag(fields, "logprobs"):
        return number or 0
    if number is not None:
        message = "top_logprobs needs logprobs=true."
        raise ApiError(400, message, param="top_logprobs")
    return None


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stops = fields.get("stop")
    stops = [stops] if isinstance(stops, str) else stops or []
    is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_list or not all(isinstance(each, str) for each in stops):
        raise ApiError(
            400, f"stop must be a text or at most {MAX_STOPS} texts.", param="stop"
        )
    return tuple(each for each in stops if each)


def _number(fields: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    what = "an integer" if kind is int else "a number"
    raise ApiError(400, f"{name}={value!r:.40} must be {what}.", param=name)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ApiError(400, f"{name}={value!r:.40} must be true or false.", param=name)


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, f"{name} must be an object.", param=name)
    return value or {}
