"""How a model that was never published is written: names, dtypes and `config.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dualpipe_jax.deepseek.model import CONFIG_FILE, DeepSeekConfig
from dualpipe_jax.deepseek.pretrained.names import copies, published_shapes
from dualpipe_jax.tokens import copy_tokenizer, special_numbers

BLOCK = (128, 128)
_STORED = {"float32": "F32", "bfloat16": "BF16"}
# What DeepSeek keeps out of float8, beside all that is no matrix.
_NOT_FP8 = ("embed_tokens.", "lm_head.", "mlp.gate.", "shared_head.", "eh_proj.")


class Target:
    """Takes the place of a `Source` when a folder is written.

    Attributes:
      block: rows and columns that share a scale; None: no weights in float8.
    """

    def __init__(
        self,
        arch: DeepSeekConfig,
        dtype: str,
        length: int,
        *,
        fp8: bool,
        tokenizer: Path | None = None,
    ):
        """Chooses names and dtypes.

        Args:
          arch: of the model.
          dtype: of the tensors, "float32" or "bfloat16"; the router's bias is float32.
          length: tokens of the longest sequence that it was trained with.
          fp8: whether matrices inside the layers are float8, in DeepSeek's layout.
          tokenizer: folder of the model's tokenizer, if it has one.
        """
        self.block = BLOCK if fp8 else None
        shapes = published_shapes(arch)
        if arch.num_nextn_predict_layers:  # as DeepSeek writes them
            shapes |= {name: shapes[other] for name, other in copies(arch).items()}
        self._shapes, self._dtype = shapes, dtype
        self._config = published_config(arch, dtype, length)
        self._tokenizer = tokenizer
        if tokenizer is not None:
            self._config |= special_numbers(tokenizer)
        if fp8:
            self._config["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": list(BLOCK),
            }

    def names(self) -> list[str]:
        """Returns the names of all tensors, without scales."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor."""
        if self.block_of(name):
            return "F8_E4M3"
        is_bias = name.endswith("e_score_correction_bias")
        return _STORED["float32" if is_bias else self._dtype]

    def block_of(self, name: str) -> tuple[int, int] | None:
        """Returns what shares a scale, if a tensor has scales."""
        is_matrix = len(self._shapes[name]) == 2
        is_left_out = any(part in name for part in _NOT_FP8)
        return self.block if is_matrix and not is_left_out else None

    def scales(self, name: str) -> None:
        """Returns no scales: there are none yet."""
        del name

    def write_others(self, folder: Path) -> None:
        """Writes what is in a folder beside the weights."""
        text = json.dumps(self._config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        if self._tokenizer is not None:
            copy_tokenizer(self._tokenizer, folder)


def published_config(arch: DeepSeekConfig, dtype: str, length: int) -> dict[str, Any]:
    """Returns the `config.json` of a model, for DeepSeek's own code and others'.

    Args:
      arch: of the model.
      dtype: of its tensors.
      length: tokens of the longest sequence that it was trained with.

    Examples:
      >>> config = DeepSeekConfig.from_pretrained("tests/data/deepseek_v2_lite")
      >>> published_config(config, "bfloat16", 64)["architectures"]
      ['DeepseekV2ForCausalLM']
    """
    fields = dataclasses.asdict(arch)
    scaling = fields.pop("rope_scaling")
    if scaling is not None:
        length = round(scaling["factor"] * scaling["original_max_position_embeddings"])
        given = {name: value for name, value in scaling.items() if value is not None}
        fields["rope_scaling"] = given | {"type": "yarn"}
    version = 3 if arch.has_router_bias else 2
    return fields | {
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "model_type": f"deepseek_v{version}",
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "moe_layer_freq": 1,
        "num_key_value_heads": arch.num_attention_heads,
        "torch_dtype": dtype,
    }
