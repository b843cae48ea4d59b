"""The folder of a published model: what is in its files, and parts of its tensors."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dualpipe_jax.deepseek.model import CONFIG_FILE
from dualpipe_jax.deepseek.pretrained.fp8 import dequantize, scale_shape
from dualpipe_jax.deepseek.pretrained.safetensors import DTYPES, File

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCALE = "_scale_inv"
_FP8 = "F8_E4M3"
# Constants that older versions of transformers saved, too.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_ALL = slice(None)
# In any format; what else is in a folder is copied when it is saved.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


class Source:
    """The tensors of a folder; they are read only when asked for.

    Attributes:
      folder: the folder.
      config: what is in its `config.json`.
      block: rows and columns of a float8 weight that share a scale; None: no such
        weights.
    """

    def __init__(self, folder: str | os.PathLike[str], config: dict[str, Any]):
        """Reads the index and the headers of all files.

        Raises:
          ValueError: a file is missing or damaged, or the weights are quantized in
            another way.
        """
        self.folder, self.config = Path(folder), config
        self.block = _block_of(config, self.folder / CONFIG_FILE)
        self._files = _files_of(self.folder)
        self._has_warned: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Returns the names of all tensors, without scales."""
        scales = {f"{name}{SCALE}" for name in self._files}
        return [
            name
            for name in self._files
            if name not in scales and not _IGNORED.search(name)
        ]

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor, a key of `DTYPES`."""
        return self._files[name].tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._files[name].tensors[name].shape

    def block_of(self, name: str) -> tuple[int, int] | None:
        """Returns what shares a scale, if a tensor has scales."""
        return self.block if self.dtype(name) == _FP8 else None

    def write_others(self, folder: Path) -> None:
        """Copies what is in the folder beside the weights, such as the tokenizer."""
        for path in self.folder.iterdir():
            if path.is_file() and not any(map(path.match, _WEIGHTS)):
                shutil.copy(path, folder / path.name)

    def check(
        self, wanted: Mapping[str, tuple[int, ...]], may_have: Mapping[str, Any]
    ) -> None:
        """Checks that the folder has the tensors of a model.

        Args:
          wanted: shapes by name.
          may_have: names of tensors that are there sometimes.

        Raises:
          ValueError: a tensor is missing, is too many, or has another shape or an
            unknown dtype.
        """
        for name in wanted:
            if name not in self._files:
                raise ValueError(
                    f"{self.folder} has no tensor {name}, which {CONFIG_FILE} asks "
                    "for; is a file missing?"
                )
        for name in self.names():
            file = self._files[name]
            info = file.tensors[name]
            if name in wanted:
                self._check_shape(name, wanted[name])
            elif name not in may_have:
                raise ValueError(
                    f"{file.path} has the tensor {name}, which {CONFIG_FILE} says "
                    "nothing about; the model would compute something else without it."
                )
            if info.dtype not in DTYPES:
                raise ValueError(
                    f"{file.path}: {name} has the dtype {info.dtype}, which is not "
                    f"implemented; the known ones are {', '.join(DTYPES)}."
                )
            if info.dtype == _FP8:
                self._check_scales(name)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        file = self._files[name]
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"{file.path}: {name} has the shape {list(file.tensors[name].shape)}, "
                f"but by {CONFIG_FILE} it is {list(shape)}."
            )

    def _check_scales(self, name: str) -> None:
        file, scales = self._files[name], f"{name}{SCALE}"
        if self.block is None:
            raise ValueError(
                f"{file.path}: {name} is {_FP8}, but {self.folder / CONFIG_FILE} has "
                "no quantization_config, which says how its scales lie."
            )
        if scales not in self._files:
            raise ValueError(
                f"{file.path}: {name} is {_FP8}, but {self.folder} has no tensor "
                f"{scales}; is a file missing?"
            )
        self._check_shape(scales, scale_shape(file.tensors[name].shape, self.block))
        of_scales = self._files[scales]
        if of_scales.tensors[scales].dtype != "F32":
            raise ValueError(
                f"{of_scales.path}: {scales} must be F32, not "
                f"{of_scales.tensors[scales].dtype}."
            )

    def scales(self, name: str) -> np.ndarray:
        """Returns the scales of a float8 weight, float32."""
        scales = f"{name}{SCALE}"
        return self._files[scales].read(scales, _ALL, _ALL)

    def read(
        self, name: str, rows: slice, columns: slice, dtype: np.dtype
    ) -> np.ndarray:
        """Returns a part of a tensor; warns if a value is NaN.

        Args:
          name: of the tensor.
          rows: of its first axis, with start and stop.
          columns: of its second axis, if it has one.
          dtype: of the result.
        """
        file = self._files[name]
        part = file.read(name, rows, columns)
        if block := self.block_of(name):
            start = rows.start, columns.start
            part = dequantize(part, self.scales(name), block, start)
        part = part.astype(dtype, copy=False)
        # The maximum is NaN if a value is. Bfloat16's own test takes 5 times as long.
        if np.isnan(np.max(part.astype(np.float32, copy=False), initial=0)):
            self._warn_of_nan(name)
        return part

    def _warn_of_nan(self, name: str) -> None:
        if name not in self._has_warned:
            self._has_warned.add(name)
            warnings.warn(
                f"{self._files[name].path}: {name} has values that are NaN; the model "
                "will compute NaN.",
                stacklevel=3,
            )


def _block_of(config: dict[str, Any], path: Path) -> tuple[int, int] | None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    given = quantization if isinstance(quantization, dict) else {}
    is_e4m3 = (given.get("quant_method"), given.get("fmt", "e4m3")) == ("fp8", "e4m3")
    match given.get("weight_block_size"):
        case [int(rows), int(columns)] if is_e4m3 and rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(
        f"{path}: quantization_config={quantization!r} is not implemented; only "
        "quant_method='fp8' in e4m3 with a weight_block_size of rows and columns is."
    )


def _files_of(folder: Path) -> dict[str, File]:
    """Returns the file of each tensor."""
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            raise ValueError(
                f"{folder} has neither {INDEX_FILE} nor {WEIGHTS_FILE}; download the "
                "model's safetensors files."
            )
        file = File(folder / WEIGHTS_FILE)
        return dict.fromkeys(file.tensors, file)
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        paths = {place: folder / place for place in sorted(set(places.values()))}
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{index} is no index of tensors; download it again."
        ) from None
    by_name = {place: File(path) for place, path in paths.items()}
    for name, place in places.items():
        if name not in by_name[place].tensors:
            raise ValueError(
                f"{folder / place} has no tensor {name}, which {INDEX_FILE} says is "
                "there; download the file again."
            )
    # Also those that the index leaves out: `check` has to see them.
    return {name: file for file in by_name.values() for name in file.tensors}
