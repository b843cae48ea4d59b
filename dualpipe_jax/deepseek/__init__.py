"""A DeepSeek-V3-style model for the training job, and a small server for it.

Published models come in, and out again, through `load_pretrained`.

Shape suffixes, the same in all modules below:

- B: sequences of a batch: of a training microbatch, rows of a prefill, or requests.
- T: positions of the queries; S: positions of the keys.
- M: tokens of a prefill's microbatch, packed one after another.
- D: width of the residual stream.
- H: attention heads; N and R: width of a head's query and key without and with a
  position; K = N + R; V: width of a head's value.
- Q: width of the compressed queries; C: width of the latent that keys and values come
  from; W = C + R: numbers that the cache keeps for each token and layer.
- U: tokens of the vocabulary.
- L: layers, or MoE layers alone; E: experts of a layer; X: physical experts of a layer.
- G: stages; P: layer positions of a stage.

Imports: deepseek.model, deepseek.pretrained, deepseek.serve.
"""

from dualpipe_jax.deepseek.model import (
    DeepSeek,
    DeepSeekConfig,
    EplbConfig,
    RopeScaling,
)
from dualpipe_jax.deepseek.pretrained import Pretrained, load_pretrained
from dualpipe_jax.deepseek.serve import ServeConfig, break_even

__all__ = [
    "DeepSeek",
    "DeepSeekConfig",
    "EplbConfig",
    "Pretrained",
    "RopeScaling",
    "ServeConfig",
    "break_even",
    "load_pretrained",
]
