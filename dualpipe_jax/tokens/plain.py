"""What a tokenizer is, and two without a vocabulary of their own: bytes and numbers."""

from __future__ import annotations

import abc
import codecs
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

# 255 is in no UTF-8 text; a larger vocabulary may have tokens above it.
_NO_BYTE = 255
# From new tokens, and whether they are the last, to the text that they add.
Decoder = Callable[[Sequence[int], bool], str]
Messages = Sequence[Mapping[str, str]]


class Tokenizer(abc.ABC):
    """Turns text into tokens and back.

    Attributes:
      unit: what one token is called in reports.
      stop_tokens: tokens that end a completion.
      token_bytes: [vocabulary] int32, how many bytes of text each token stands for;
        None: not known.
    """

    unit: str = "token"
    stop_tokens: tuple[int, ...] = ()
    token_bytes: np.ndarray | None = None

    def check_fits(self, vocab_size: int | None) -> None:
        """Checks that a model can have all tokens.

        Args:
          vocab_size: of the model; None: not known.

        Raises:
          ValueError: its vocabulary is smaller.
        """
        del vocab_size

    def save(self, folder: Path) -> None:
        """Writes what the tokenizer is read from into a new folder, if there is any."""
        del folder

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt.

        Raises:
          ValueError: the text cannot be written in these tokens.
        """

    @abc.abstractmethod
    def decoder(self) -> Decoder:
        """A function to call with a few tokens at a time, as they are generated."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        return self.decoder()(tokens, True)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Tokens of a conversation, up to where the model's next reply begins.

        Args:
          messages: each with `role` and `content`.

        Raises:
          ValueError: there is no chat template, or it refuses the messages.
        """
        del messages
        raise ValueError(
            "there is no chat template; give plain prompts, or the folder of a "
            "tokenizer that has one."
        )


class ByteTokenizer(Tokenizer):
    """Bytes of UTF-8; what they do not form is U+FFFD.

    Examples:
      >>> tokenizer = ByteTokenizer()
      >>> tokenizer.encode("né")
      [110, 195, 169]
      >>> decode = tokenizer.decoder()
      >>> decode([110, 195], False), decode([169], True)
      ('n', 'é')
    """

    unit = "byte"
    token_bytes = np.ones(256, np.int32)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decoder(self) -> Decoder:
        # A character of several bytes is written when all of them are there.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda tokens, is_last: decoder.decode(
            bytes(min(int(token), _NO_BYTE) for token in tokens), is_last
        )


class NumberTokenizer(Tokenizer):
    """Tokens as their numbers, for a vocabulary that nobody has described.

    Examples:
      >>> tokenizer = NumberTokenizer()
      >>> tokenizer.encode("7 300"), tokenizer.decode([7, 300])
      ([7, 300], '7 300 ')
    """

    def encode(self, text: str) -> list[int]:
        words = text.split()
        if not all(word.isdecimal() for word in words):
            raise ValueError(
                f"prompt {text[:40]!r} must be token numbers, separated by spaces, as "
                "there is no tokenizer."
            )
        return [int(word) for word in words]

    def decoder(self) -> Decoder:
        return lambda tokens, is_last: "".join(f"{token} " for token in tokens)
