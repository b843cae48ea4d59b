"""Learns a tokenizer from text: byte pair encoding of UTF-8, which covers any text."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dualpipe_jax.files import replace_text
from dualpipe_jax.tokens.documents import read_pieces
from dualpipe_jax.tokens.published import FILE

END_TOKEN = "<|end_of_text|>"
# More text hardly changes a vocabulary, but learning keeps its words in memory.
MAX_CHARACTERS = 10**9
# A token for each byte, and the end token.
MIN_VOCAB_SIZE = 257


def learn_tokenizer(
    files: Sequence[Path],
    vocab_size: int,
    folder: str | os.PathLike[str],
    *,
    field: str = "text",
    report: Callable[[int], Any] = lambda num_characters: None,
) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers reads, too.

    Args:
      files: see `documents.read_pieces`; the first 10^9 characters are learned from.
      vocab_size: most tokens; text that repeats little has fewer.
      folder: where to.
      field: name of the text in JSON lines and Parquet.
      report: called with the number of characters read, now and then.

    Raises:
      ImportError: the package tokenizers is not installed.
      ValueError: the vocabulary is too small, or a file cannot be read.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if not MIN_VOCAB_SIZE <= vocab_size < 2**31:
        raise ValueError(
            f"--vocab-size {vocab_size} must be at least {MIN_VOCAB_SIZE}: a token for "
            "each byte, and the end token."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files, field, report), trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    replace_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    replace_text(folder / FILE, tokenizer.to_str(pretty=True) + "\n")


def _texts(
    files: Sequence[Path], field: str, report: Callable[[int], Any]
) -> Iterator[str]:
    num_characters = 0
    pieces = itertools.chain.from_iterable(read_pieces(path, field) for path in files)
    for piece in pieces:
        texts = [piece.text]
        if not isinstance(piece.text, str):
            texts = [message.get("content") for message in piece.text]
        for text in texts:
            if isinstance(text, str):
                yield text
                num_characters += len(text)
        report(num_characters)
        if num_characters >= MAX_CHARACTERS:
            return
