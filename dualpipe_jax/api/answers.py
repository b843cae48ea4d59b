"""Answers in the form of OpenAI's API: whole ones, and the events of streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dualpipe_jax.deepseek.serve import Token
from dualpipe_jax.tokens import Tokenizer

DONE = b"data: [DONE]\n\n"


class Piece(NamedTuple):
    """A part of a completion.

    Attributes:
      choice: which of several completions.
      text: that has been added.
      tokens: whose text it is.
      finish_reason: `"stop"` or `"length"` at the end, or None.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


class Answer:
    """The answer to one request, as a whole or piece by piece.

    Attributes:
      is_chat: whether it is a reply in a conversation, not a completion.
      num_prompt: tokens of all prompts.
      num_generated: tokens so far.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        num_prompt: int,
        num_logprobs: int | None,
        *,
        is_chat: bool,
    ):
        """Starts an answer.

        Args:
          model: name of the model.
          tokenizer: of the model.
          num_prompt: tokens of all prompts.
          num_logprobs: see `Engine.submit`.
          is_chat: see `Answer`.
        """
        self.is_chat, self.num_prompt, self.num_generated = is_chat, num_prompt, 0
        self._tokenizer, self._num_logprobs = tokenizer, num_logprobs
        name = "chatcmpl" if is_chat else "cmpl"
        self._common = {
            "id": f"{name}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        # What is the same in all events is written once.
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        common = json.dumps({**self._common, "object": kind})[:-1]
        self._before, self._after = f'data: {common}, "choices": [', "]}\n\n"
        self._lengths: dict[int, int] = {}

    def whole(self, pieces: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        """Returns the answer's JSON, from the pieces of each completion."""
        choices = []
        for index, own in sorted(pieces.items()):
            text = "".join(piece.text for piece in own)
            tokens = [token for piece in own for token in piece.tokens]
            reason = own[-1].finish_reason
            message = {"role": "assistant", "content": text, "refusal": None}
            choices.append(
                {
                    "index": index,
                    **({"message": message} if self.is_chat else {"text": text}),
                    "logprobs": self._logprobs(tokens, 0),
                    "finish_reason": reason,
                }
            )
        kind = "chat.completion" if self.is_chat else "text_completion"
        usage = {"usage": self.usage()}
        return {**self._common, "object": kind, "choices": choices, **usage}

    def usage(self) -> dict[str, int]:
        """Returns the numbers of tokens."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
        }

    def start(self, num_choices: int) -> bytes:
        """Returns the events that a stream begins with."""
        if not self.is_chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return b"".join(
            self._chunk(index, {"delta": delta}, None, None)
            for index in range(num_choices)
        )

    def event(self, piece: Piece) -> bytes:
        """Returns the event of a piece."""
        start = self._lengths.get(piece.choice, 0)
        self._lengths[piece.choice] = start + len(piece.text)
        content: dict[str, Any] = {"text": piece.text}
        if self.is_chat:
            content = {"delta": {"content": piece.text} if piece.text else {}}
        logprobs = self._logprobs(piece.tokens, start)
        return self._chunk(piece.choice, content, logprobs, piece.finish_reason)

    def end(self, has_usage: bool) -> bytes:
        """Returns what a stream ends with."""
        if not has_usage:
            return DONE
        usage = json.dumps(self.usage())
        return f'{self._before}], "usage": {usage}}}\n\n'.encode() + DONE

    def _chunk(
        self, index: int, content: Mapping[str, Any], logprobs: Any, reason: str | None
    ) -> bytes:
        choice = {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        return f"{self._before}{json.dumps(choice)}{self._after}".encode()

    def _logprobs(self, tokens: Sequence[Token], start: int) -> Any:
        """Returns the log probabilities of tokens, whose text begins at `start`."""
        if self._num_logprobs is None:
            return None
        if self.is_chat:
            return {"content": [self._chat_logprobs(each) for each in tokens]}
        texts = [self._text(token.token) for token in tokens]
        offsets = [start + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._text(each): value for each, value in token.top_logprobs}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _chat_logprobs(self, token: Token) -> dict[str, Any]:
        def entry(number: int, logprob: float | None) -> dict[str, Any]:
            text = self._text(number)
            return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}

        top = [entry(*each) for each in token.top_logprobs]
        return {**entry(token.token, token.logprob), "top_logprobs": top}

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])
