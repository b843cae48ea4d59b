"""Matrix products: one per group of rows, and in float8 with scales.

In reading order: `grouped`; `scaled` (values and scales), `quantize`, `scaled_products`
and `scaled_kernels`; `scaled_rows` and `linear` (a layer's three products in float8).

Imports: placement.
"""

from eplb_jax.products.grouped import (
    Implementation as Implementation,
    grouped_matmul,
)
from eplb_jax.products.kernels import (
    cross_compiling as cross_compiling,
    load_tokamax as load_tokamax,
    on_cuda as on_cuda,
)
from eplb_jax.products.linear import (
    ScaledWeight as ScaledWeight,
    scaled_linear as scaled_linear,
    scaled_swiglu as scaled_swiglu,
    swiglu as swiglu,
)
from eplb_jax.products.quantize import quantize_blocks, quantize_tiles
from eplb_jax.products.scaled import (
    E4M3 as E4M3,
    LARGEST as LARGEST,
    TILE as TILE,
    Scaled,
    dequantize as dequantize,
)
from eplb_jax.products.scaled_products import (
    scaled_grouped_matmul,
    scaled_matmul,
    scaled_weight_grad as scaled_weight_grad,
)
from eplb_jax.products.scaled_rows import (
    ScaledRows as ScaledRows,
    named_rows as named_rows,
    rows_of as rows_of,
    scale_rows as scale_rows,
    unscale_rows as unscale_rows,
)
from eplb_jax.products.triton_dot import check_has_float8 as check_has_float8
from eplb_jax.products.varying import is_typed as is_typed, vary_alike as vary_alike

__all__ = [
    "Scaled",
    "grouped_matmul",
    "quantize_blocks",
    "quantize_tiles",
    "scaled_grouped_matmul",
    "scaled_matmul",
]
