"""Placements as the files that engines start with, both ways."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jax.typing import ArrayLike

from eplb_jax.files.contents import as_array, read_content, reading
from eplb_jax.placement import ExpertTables, as_placement

Engine = Literal["eplb-jax", "sglang", "tensorrt-llm", "vllm-ascend"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
_MAP = "physical_to_logical_map"
_SUFFIXES: dict[str, Engine] = {
    ".npz": "eplb-jax",
    ".npy": "sglang",
    ".json": "sglang",
    ".yaml": "tensorrt-llm",
    ".yml": "tensorrt-llm",
}


class PlacementFile(NamedTuple):
    """A placement as a file has it.

    Attributes:
      layers: index of the layer that each row is for, as the file counts.
      physical_to_logical_map: [rows, physical experts] int32; -1 if empty.
    """

    layers: tuple[int, ...]
    physical_to_logical_map: np.ndarray


def engine_of(path: Path, engine: str | None = None) -> Engine:
    """Returns the engine that a file is for, by default by its name.

    Raises:
      ValueError: the engine is unknown, or reads no file of such a name.
    """
    suffix = path.suffix.lower()
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"{engine=} must be one of {', '.join(ENGINES)}.")
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(_SUFFIXES)}.")
    if engine is None:
        return _SUFFIXES[suffix]
    named = [each for each, its in _SUFFIXES.items() if its == engine] or [".json"]
    if suffix not in named:
        raise ValueError(f"{path} must end in {' or '.join(named)} for {engine=}.")
    return engine


def write_placement(
    path: str | Path,
    physical_to_logical_map: ArrayLike,
    *,
    engine: Engine | None = None,
    layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    num_devices: int | None = None,
) -> None:
    """Writes a placement for an engine to start with.

    | `engine` | program and option | file |
    |---|---|---|
    | `"eplb-jax"` | ours: the maps of `ExpertTables`, for `numpy.load` | `.npz` |
    | `"sglang"` | SGLang and sglang-jax, `--init-expert-location` | `.json`, `.npy` |
    | `"tensorrt-llm"` | TensorRT-LLM, `moe_config.load_balancer` | `.yaml` |
    | `"vllm-ascend"` | vllm-ascend, `expert_map_path` | `.json` |

    SGLang looks rows up by the layer's index in the model: dense layers get a row with
    experts in order. TensorRT-LLM names the layers that it has; our own maps and
    vllm-ascend's are those of the layers with experts.

    Args:
      path: of the file.
      physical_to_logical_map: [rows, physical experts] integers.
      engine: by default by the file's name; JSON is SGLang's then.
      layers: index in the model of the layer that each row is for; None: row i is for
        layer i.
      num_layers: layers of the model, dense ones included; None: up to the last row's.
      num_devices: for `"vllm-ascend"`, which lists experts by device.

    Raises:
      ValueError: for a placement in which an expert has no replica, for physical
        experts that are empty, which other engines do not know, and for `layers` that
        are no increasing indices.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "maps.json"
      ...     write_placement(path, [[1, 0, 1]], layers=[1])
      ...     path.read_text()
      '{"physical_to_logical_map": [[0, 1, 0], [1, 0, 1]]}'
    """
    path = Path(path)
    engine = engine_of(path, engine)
    rows = np.asarray(as_placement(physical_to_logical_map))
    if rows.ndim != 2 or not rows.size:
        raise ValueError(
            f"{_MAP} has shape {rows.shape}; it must be [layers, physical experts]."
        )
    num_experts = int(rows.max()) + 1
    tables = ExpertTables.from_placement(rows, num_experts)
    indices = _checked_layers(layers, len(rows), num_layers)
    if engine != "eplb-jax" and (rows < 0).any():
        raise ValueError(
            f"{path} is for servers that take -1, an empty physical expert, for the "
            "last expert; write .npz, or plan for the devices that are alive."
        )
    if engine == "eplb-jax":
        maps: dict[str, Any] = {k: np.asarray(v) for k, v in tables._asdict().items()}
        with path.open("wb") as file:  # np.savez would add a suffix to `.NPZ`
            np.savez(file, layers=np.array(indices), **maps)
    elif engine == "sglang":
        num_layers = indices[-1] + 1 if num_layers is None else num_layers
        in_order = np.arange(rows.shape[1], dtype=rows.dtype) % num_experts
        every = np.tile(in_order, (num_layers, 1))
        every[list(indices)] = rows
        if path.suffix.lower() == ".npy":
            with path.open("wb") as file:
                np.save(file, every)
        else:
            path.write_text(json.dumps({_MAP: every.tolist()}))
    elif engine == "tensorrt-llm":
        path.write_text(_as_yaml(rows, indices))
    else:
        path.write_text(json.dumps(_by_device(rows, num_devices), indent=1))


def read_placement(path: str | Path, *, engine: Engine | None = None) -> PlacementFile:
    """Reads a placement that `write_placement`, or a tool of an engine, wrote.

    Args:
      path: of the file.
      engine: by default by the file's name, and for JSON by what it holds.

    Returns:
      A `PlacementFile`.

    Raises:
      ImportError: for YAML, without the package pyyaml.
      ValueError: the file does not exist, is damaged, or holds something else.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "maps.json"
      ...     write_placement(path, [[1, 0, 1]], layers=[1])
      ...     read_placement(path).physical_to_logical_map.tolist()
      [[0, 1, 0], [1, 0, 1]]
    """
    path = Path(path)
    engine = engine_of(path, engine)
    read = _yaml_reader() if engine == "tensorrt-llm" else read_content
    with reading(path, f"{_MAP} is [layers, physical experts]"):
        rows, layers = _rows_of(read(path))
        placement = rows if isinstance(rows, np.ndarray) else as_array(rows)
        if placement.ndim != 2 or placement.dtype.kind not in "iu":
            raise ValueError(
                f"it holds {placement.dtype}{list(placement.shape)}, but a placement "
                "is integers, [layers, physical experts]."
            )
        placement = np.asarray(as_placement(placement))
        if layers is None:
            layers = range(len(placement))
        layers = _checked_layers(layers, len(placement), None)
    return PlacementFile(layers, placement)


def _checked_layers(
    layers: Sequence[int] | None, num_rows: int, num_layers: int | None
) -> tuple[int, ...]:
    found = range(num_rows) if layers is None else np.asarray(layers).tolist()
    end = float("inf") if num_layers is None else num_layers
    is_whole = all(isinstance(each, int) and 0 <= each < end for each in found)
    if len(found) != num_rows or not is_whole or list(found) != sorted({*found}):
        raise ValueError(
            f"layers={list(found)} must be {num_rows} increasing indices of layers, "
            f"one for each row, below {num_layers=}."
        )
    return tuple(found)


def _as_yaml(rows: np.ndarray, layers: Sequence[int]) -> str:
    """Returns what TensorRT-LLM reads as its load balancer's configuration."""
    lines = [f"num_slots: {rows.shape[1]}", "initial_global_assignments:"]
    lines += [f"  {at}: {row.tolist()}" for at, row in zip(layers, rows, strict=True)]
    # 0: the placement stays; another number lets that engine move experts later.
    return "\n".join([*lines, "layer_updates_per_iter: 0", ""])


def _by_device(rows: np.ndarray, num_devices: int | None) -> dict[str, Any]:
    """Returns vllm-ascend's object; it counts the layers with experts from 0."""
    if num_devices is None or num_devices < 1 or rows.shape[1] % num_devices:
        raise ValueError(
            f"{num_devices=} must divide the {rows.shape[1]} physical experts, which "
            "vllm-ascend lists by device."
        )
    by_device = rows.reshape(len(rows), num_devices, -1).tolist()
    layer_list = [
        {
            "layer_id": layer,
            "device_count": num_devices,
            "device_list": [
                {"device_id": device, "device_expert": experts}
                for device, experts in enumerate(devices)
            ],
        }
        for layer, devices in enumerate(by_device)
    ]
    return {"moe_layer_count": len(rows), "layer_list": layer_list}


def _rows_of(data: Any) -> tuple[Any, Sequence[int] | None]:
    """Returns the rows of any format, and their layers if it names them."""
    if not isinstance(data, Mapping):
        return data, None
    if _MAP in data:
        layers = data.get("layers")
        return data[_MAP], None if layers is None else layers.tolist()
    if "initial_global_assignments" in data:
        named = data["initial_global_assignments"]
        return list(named.values()), list(named)
    if "layer_list" in data:
        layers = sorted(data["layer_list"], key=_number("layer_id"))
        rows = [
            [*itertools.chain(*(each["device_expert"] for each in _devices(layer)))]
            for layer in layers
        ]
        return rows, [layer["layer_id"] for layer in layers]
    names = ", ".join(str(name)[:40] for name in [*data][:5]) or "nothing"
    raise ValueError(f"the object has no `{_MAP}`, only {names}.")


def _devices(layer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(layer["device_list"], key=_number("device_id"))


def _number(name: str) -> Callable[[Mapping[str, Any]], int]:
    return lambda entry: entry[name]


def _yaml_reader() -> Callable[[Path], Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "Reading YAML needs the package pyyaml: pip install 'dualpipe-jax[yaml]'."
        ) from error

    class Loader(yaml.SafeLoader):
        """A loader without aliases, by which a small file may grow without end."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it uses aliases, which a placement does not need.")
            return super().compose_node(parent, index)

    return lambda path: yaml.load(path.read_text(encoding="utf-8"), Loader)
