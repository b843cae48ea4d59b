"""The folder of tokens that `tokenize` writes: what it holds, and how it is read."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from dualpipe_jax.tokens.published import PublishedTokenizer

INFO_FILE, TOKENS_FILE = "tokens.json", "tokens.npy"
# There while the folder is being written.
PROGRESS_FILE = "progress.json"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What `tokens.json` says.

    Attributes:
      num_tokens: of all documents, with the end tokens.
      num_documents: each is followed by the end token.
      num_bytes: of their text as UTF-8.
      end_token: the number of the end token.
      tokenizer: digest of the tokenizer, which is in the folder too.
      source: what the text was, for the reader of a log.
    """

    num_tokens: int
    num_documents: int
    num_bytes: int
    end_token: int
    tokenizer: str
    source: str

    @classmethod
    def read(cls, path: Path) -> DatasetInfo:
        """Reads `tokens.json`.

        Raises:
          ValueError: it holds something else.
        """
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            info = cls(**{f.name: found[f.name] for f in dataclasses.fields(cls)})
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} does not describe tokens ({error}); write the folder again "
                "with `tokenize`."
            ) from error
        return info


def is_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that `tokenize` writes, or has begun to write."""
    folder = Path(path)
    return (folder / INFO_FILE).is_file() or (folder / PROGRESS_FILE).is_file()


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """A folder that `tokenize` has written.

    Attributes:
      path: the file of tokens.
      info: what they are.
      tokenizer: of the tokens.
    """

    path: Path
    info: DatasetInfo
    tokenizer: PublishedTokenizer

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TokenDataset:
        """Opens a folder.

        Raises:
          ImportError: the package tokenizers is not installed.
          ValueError: the folder is unfinished or damaged.
        """
        folder = Path(folder)
        if (folder / PROGRESS_FILE).is_file():
            raise ValueError(
                f"{folder} is not complete; start the same `tokenize` again, which "
                "continues."
            )
        info, tokenizer = (
            DatasetInfo.read(folder / INFO_FILE),
            PublishedTokenizer(folder),
        )
        if tokenizer.digest != info.tokenizer:
            raise ValueError(
                f"{folder} holds tokens of another tokenizer than its tokenizer.json; "
                "write the folder again with `tokenize`."
            )
        return cls(folder / TOKENS_FILE, info, tokenizer)
