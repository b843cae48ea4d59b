"""Published DeepSeek models: read from Hugging Face folders, and written as such.

`pretrained` is what users call; `names` says which tensor each parameter is, `source`
what a folder holds, `safetensors` and `fp8` how it lies in files; `reading` and
`saving` move weights, and `forward` computes logits.

Imports: schedules.generators, executor, tokens, train, deepseek.model,
eplb_jax.files, eplb_jax.products.
"""

from dualpipe_jax.deepseek.pretrained.exporting import export_run as export_run
from dualpipe_jax.deepseek.pretrained.pretrained import (
    Pretrained,
    check_same as check_same,
    load_pretrained,
    open_folder as open_folder,
    reader_for as reader_for,
)
from dualpipe_jax.deepseek.pretrained.reading import (
    read_bias as read_bias,
    read_params as read_params,
)

__all__ = ["Pretrained", "load_pretrained"]
