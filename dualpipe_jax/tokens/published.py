"""The tokenizer of a Hugging Face folder: tokenizer.json and the files beside it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualpipe_jax.tokens.chat import ChatTemplate
from dualpipe_jax.tokens.plain import Decoder, Messages, Tokenizer

FILE = "tokenizer.json"
_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"
_TEMPLATE = "chat_template.jinja"
# What describes a tokenizer in a model's folder.
FILES = (FILE, _CONFIG, "special_tokens_map.json", _TEMPLATE, _GENERATION)
# A byte that no other token covers, in vocabularies with `byte_fallback`.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in vocabularies of SentencePiece


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a tokenizer that can be read."""
    return (Path(folder) / FILE).is_file()


def copy_tokenizer(
    source: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> None:
    """Copies a tokenizer's files into a folder, where there are any."""
    for name in FILES:
        if (path := Path(source) / name).is_file():
            shutil.copyfile(path, Path(folder) / name)


def special_numbers(folder: str | os.PathLike[str]) -> dict[str, int]:
    """The entries of a model's `config.json` that name special tokens of a folder.

    Raises:
      ValueError: a file is damaged.
    """
    config, tokenizer = _object(Path(folder) / _CONFIG), _object(Path(folder) / FILE)
    numbers = {
        each.get("content"): each.get("id")
        for each in tokenizer.get("added_tokens", [])
    }
    found = {
        f"{name}_id": numbers.get(_token_text(config.get(name)))
        for name in ("bos_token", "eos_token", "pad_token")
    }
    return {name: number for name, number in found.items() if number is not None}


class PublishedTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face folder, read by the package tokenizers.

    Attributes:
      folder: the folder.
      digest: tells tokenizers apart.
      vocab_size: tokens are below it.
      end_token: separates documents; None: the folder names none.
      token_bytes: see `Tokenizer`; special tokens stand for none.

    Raises:
      ImportError: the package tokenizers is not installed.
      ValueError: the folder has no tokenizer.json, or a damaged file.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        import tokenizers

        self.folder = Path(folder)
        path = self.folder / FILE
        if not path.is_file():
            raise ValueError(
                f"{self.folder} has no {FILE}; give a folder with one, such as a "
                "published model's. (transformers converts other kinds of tokenizers.)"
            )
        try:
            text = path.read_text(encoding="utf-8")
            self._inner = tokenizers.Tokenizer.from_str(text)
            self._parsed = json.loads(text)
        except Exception as error:  # the package raises nothing more special
            raise ValueError(
                f"{path} is no tokenizer that tokenizers {tokenizers.__version__} "
                f"reads ({error}); download it again, or update the package."
            ) from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self._config = _object(self.folder / _CONFIG)
        self._special = {
            name: _token_text(self._config.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.end_token = self._vocabulary.get(self._special["eos_token"])
        self.stop_tokens = self._read_stop_tokens()
        if self.end_token is None and self.stop_tokens:
            self.end_token = self.stop_tokens[0]

    def check_fits(self, vocab_size: int | None) -> None:
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ValueError(
                f"{self.folder / FILE} has {self.vocab_size} tokens, but the model's "
                f"vocab_size is {vocab_size}; use the tokenizer that it was made for."
            )

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(self.folder, folder)

    def number_of(self, token: str) -> int:
        """The number of a token.

        Raises:
          ValueError: it is not in the vocabulary.
        """
        if token not in self._vocabulary:
            raise ValueError(f"{self.folder / FILE} has no token {token!r}.")
        return self._vocabulary[token]

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the token that texts begin with, if there is one."""
        _check_unicode(text)
        tokens = self._inner.encode(text).ids
        first = self._vocabulary.get(self._special["bos_token"])
        # Some published files leave this to the class that reads them.
        if first is None or self._config.get("add_bos_token") is not True:
            return tokens
        return tokens if tokens[:1] == [first] else [first, *tokens]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts as they are: special tokens in them are not parsed.

        All cores are used, unless the environment has TOKENIZERS_PARALLELISM=false.
        """
        return self._encode_all(texts, is_text=True)

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of what a chat template has written, with special tokens."""
        return self._encode_all(texts, is_text=False)

    def _encode_all(self, texts: Sequence[str], *, is_text: bool) -> list[list[int]]:
        self._inner.encode_special_tokens = is_text
        try:
            found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self._inner.encode_special_tokens = False
        return [each.ids for each in found]

    def decoder(self) -> Decoder:
        from tokenizers.decoders import DecodeStream

        stream, all_tokens, written = DecodeStream(skip_special_tokens=True), [], []

        def decode(tokens: Sequence[int], is_last: bool) -> str:
            new = []
            for token in map(int, tokens):
                all_tokens.append(token)
                # Tokens beyond the vocabulary are padding of the model's matrices.
                if token < self.vocab_size:
                    new.append(stream.step(self._inner, token) or "")
            text = "".join(new)
            written.append(text)
            if not is_last:
                return text
            # A character whose last bytes did not come.
            whole = self._inner.decode(all_tokens, skip_special_tokens=True)
            so_far = "".join(written)
            return text + (whole[len(so_far) :] if whole.startswith(so_far) else "")

        return decode

    @functools.cached_property
    def _template(self) -> ChatTemplate | None:
        path, source = self.folder / _TEMPLATE, self._config.get("chat_template")
        if path.is_file():
            source = path.read_text(encoding="utf-8")
        if isinstance(source, list):  # several by name, one for tools
            by_name = {t.get("name"): t.get("template") for t in source}
            source = by_name.get("default")
        special = {name: token for name, token in self._special.items() if token}
        try:
            return ChatTemplate(source, special) if isinstance(source, str) else None
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    def encode_chat(self, messages: Messages) -> list[int]:
        rendered = self.render(messages)
        _check_unicode(rendered)
        return self.encode_rendered([rendered])[0]

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """A conversation as text; see `ChatTemplate.render`.

        Raises:
          ValueError: there is no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise ValueError(f"{self.folder} has no chat template; give plain prompts.")
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt
        )

    @functools.cached_property
    def token_bytes(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        decoders = _types_of(self._parsed.get("decoder"))
        is_byte_level = "ByteLevel" in decoders
        if not is_byte_level and not decoders & {"Metaspace", "ByteFallback"}:
            return None
        added = {each["id"]: each for each in self._parsed.get("added_tokens", [])}
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, number in self._vocabulary.items():
            if number in added:
                is_special = added[number].get("special", False)
                sizes[number] = 0 if is_special else len(token.encode())
            elif is_byte_level:
                sizes[number] = len(token)  # one character for each byte
            elif _BYTE.fullmatch(token):
                sizes[number] = 1
            else:
                sizes[number] = len(token.replace(_SPACE, " ").encode())
        return sizes

    def _read_stop_tokens(self) -> tuple[int, ...]:
        found = _object(self.folder / _GENERATION).get("eos_token_id")
        if found is None:
            found = _object(self.folder / "config.json").get("eos_token_id")
        numbers = found if isinstance(found, list) else [found]
        stops = [self.end_token, *numbers]
        return tuple(dict.fromkeys(each for each in stops if type(each) is int))


def _object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not an object in JSON; download it again.")
    return found


def _token_text(token: Any) -> str:
    """A token as configurations write it: text, or an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _types_of(decoder: Any) -> set[str]:
    """The kinds of a decoder, and of those that it consists of."""
    if not isinstance(decoder, dict):
        return set()
    parts = decoder.get("decoders") or []
    return {str(decoder.get("type"))}.union(*map(_types_of, parts))


def _check_unicode(text: str) -> None:
    """Raises UnicodeEncodeError, a ValueError, for halves of surrogate pairs."""
    text.encode()
