"""Reads the `config.json` of a published model, and refuses what is not implemented."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dualpipe_jax.deepseek.model.rope import RopeScaling

CONFIG_FILE = "config.json"
# For each `model_type` the fields that a file may leave out, as DeepSeek's own code and
# transformers read them. Kimi K2 and Moonlight are DeepSeek-V3 in other sizes.
_V2 = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}
_V3 = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}
DEFAULTS = {"deepseek_v2": _V2, "deepseek_v3": _V3, "kimi_k2": _V3}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "moe_intermediate_size",
    "num_experts_per_tok",
)
# Optional, with the defaults of `DeepSeekConfig`.
_OPTIONAL = (
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "num_nextn_predict_layers",
)
# The only values that are implemented; None, or no such field, is one of them.
_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_dropout": 0,
    "rope_interleave": True,
    "partial_rotary_factor": 1,
    "moe_layer_freq": 1,
}
_ROPE_TYPES = ("rope_type", "type")
_ROPE_FIELDS = tuple(RopeScaling.__dataclass_fields__)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the JSON object in a folder's `config.json`.

    Raises:
      ValueError: no such folder or file, or it is no JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is not a folder; download the model first, with config.json and "
            "all *.safetensors files."
        )
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}; give the folder of a Hugging Face model."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; download it again.")
    return config


def fields_of(config: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the fields of `DeepSeekConfig` for a `config.json`.

    Args:
      config: what is in the file.
      path: of the file, for messages.

    Raises:
      ValueError: another kind of model, a field is missing, or has a value that is not
        implemented.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise ValueError(
            f"{path}: model_type={kind!r} is not implemented; the known ones are "
            f"{known}."
        )
    given = {name: value for name, value in config.items() if value is not None}
    for name in _REQUIRED:
        if name not in given:
            raise ValueError(f"{path} has no {name}, which a {kind} model needs.")
    _check_implemented(given, path)
    fields = {name: given[name] for name in _REQUIRED}
    fields |= {name: given[name] for name in _OPTIONAL if name in given}
    fields |= {name: given.get(name, value) for name, value in DEFAULTS[kind].items()}
    fields["q_lora_rank"] = given.get("q_lora_rank") or None
    fields["n_shared_experts"] = given.get("n_shared_experts", 0)
    if fields["topk_method"] != "greedy":  # which ignores groups
        fields |= {name: given.get(name, 1) for name in ("n_group", "topk_group")}
    theta, scaling = _rope(given, path)
    return fields | {"rope_theta": theta, "rope_scaling": scaling}


def _check_implemented(given: dict[str, Any], path: Any) -> None:
    only = _ONLY | {"num_key_value_heads": given["num_attention_heads"]}
    widths = [given["qk_nope_head_dim"], given["qk_rope_head_dim"]]
    if all(isinstance(width, int) for width in widths):  # else refused later
        only["qk_head_dim"] = sum(widths)
    for name, value in only.items():
        if name in given and given[name] != value:
            raise ValueError(
                f"{path}: {name}={given[name]!r} is not implemented; only "
                f"{name}={value!r} is."
            )


def _rope(given: dict[str, Any], path: Any) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling, from the new or the old spelling."""
    name = "rope_parameters" if "rope_parameters" in given else "rope_scaling"
    rope = given.get(name, {})
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: {name}={rope!r} must be an object.")
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", given.get("rope_theta", 10_000.0))
    kinds = [rope.pop(key) for key in _ROPE_TYPES if key in rope]
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "yarn"):
        raise ValueError(
            f"{path}: {name} of type {kind!r} is not implemented; only 'yarn' is."
        )
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{path}: partial_rotary_factor of {name} must be 1.")
    if kind == "default":
        return theta, None
    rope.setdefault(
        "original_max_position_embeddings", given.get("max_position_embeddings")
    )
    if unknown := sorted(rope.keys() - set(_ROPE_FIELDS)):
        raise ValueError(
            f"{path}: {unknown[0]} of {name} is not implemented; the known fields are "
            f"{', '.join(_ROPE_FIELDS)}."
        )
    if "factor" not in rope:
        raise ValueError(f"{path}: {name} has no factor, which yarn needs.")
    try:
        return theta, RopeScaling(**rope)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from None
