"""What XLA and Triton make of float8 products, for Hopper GPUs without any."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout

from dualpipe_jax.gpu import gpu_compiler_options, gpu_mesh
from eplb_jax import (
    Scaled,
    quantize_blocks,
    quantize_tiles,
    scaled_grouped_matmul,
    scaled_matmul,
)
from eplb_jax.products import scaled_weight_grad
from tests.kept import KeptLowered
from tests.modules import computations

# Each compiles kernels for GPUs.
pytestmark = [pytest.mark.slow, pytest.mark.as_users]

# As in DeepSeek-V3. For small arrays XLA keeps more: it costs next to nothing.
ROWS, IN, OUT, GROUPS = 4096, 7168, 2048, 4


def compiled(gpu, function, *shapes):
    """Compiles a function of arrays of these shapes, dtypes and, for some, layouts."""
    mesh = gpu_mesh(gpu, {"ep": 1})
    sharding = jax.NamedSharding(mesh, jax.P())
    args = [jax.ShapeDtypeStruct(*each[:2], sharding=sharding) for each in shapes]
    formats = [Format(each[2] if len(each) > 2 else None, sharding) for each in shapes]
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
    )
    lowered = jax.jit(mapped, in_shardings=formats).lower(*args)
    return KeptLowered(lowered, mesh).compile(gpu_compiler_options(), with_ptx=True)


def kernels(ptx):
    """The entries of a PTX text that are kernels of Pallas, by name."""
    found = re.split(r"(?=\.visible \.entry )", ptx)[1:]
    named = {re.match(r"\.visible \.entry (\w+)", each)[1]: each for each in found}
    return {name: each for name, each in named.items() if "_kernel" in name}


def three_products(x, w, dy, sizes=None):
    """Those of a linear layer, from what it has in bfloat16."""
    weight = quantize_blocks(w)
    columns = (quantize_tiles(each, axis=-2) for each in (x, dy))
    if sizes is None:
        y = scaled_matmul(quantize_tiles(x), weight)
        dx = scaled_matmul(quantize_tiles(dy), weight.transposed)
    else:
        y = scaled_grouped_matmul(quantize_tiles(x), weight, sizes)
        dx = scaled_grouped_matmul(quantize_tiles(dy), weight.transposed, sizes)
    return y, dx, scaled_weight_grad(*columns, sizes)


@pytest.mark.parametrize("groups", [0, GROUPS], ids=["dense", "grouped"])
@pytest.mark.parametrize("gpu", ["h100", "h800"])
def test_products_run_on_float8_tensor_cores(gpu, groups):
    weight = (groups, IN, OUT) if groups else (IN, OUT)
    shapes = [
        ((ROWS, IN), jnp.bfloat16),
        (weight, jnp.bfloat16),
        ((ROWS, OUT), jnp.bfloat16),
        *([((groups,), jnp.int32)] if groups else []),
    ]
    program = compiled(gpu, three_products, *shapes)
    found = kernels(program.ptx)
    # The forward product and the input's gradient differ in their shapes.
    assert len(found) == 3
    for name, text in found.items():
        assert re.search(r"wgmma\.mma_async\S*\.e4m3\.e4m3", text), name
        assert "mma.sync" not in text, name
        assert "cp.async" in text, name  # operands arrive while others are multiplied
    # Quantizing is a pass for the scales and one for the values: nothing else is as
    # large as an operand, in bfloat16 or float32, but the results.
    wide = {
        f"{dtype}[{','.join(map(str, dims))}]"
        for dtype, dims in written(program.as_text())
        if math.prod(dims) >= ROWS * OUT and dtype != "f8e4m3fn"
    }
    results = f"bf16[{ROWS},{OUT}]", f"bf16[{ROWS},{IN}]"
    assert wide <= {*results, f"f32[{max(groups, 1)},{IN},{OUT}]"}


def test_a_product_needs_no_memory():
    """With a weight that lies along the axis that is summed over."""
    along = Layout((1, 0))

    def run(x, x_scales, w, w_scales):
        return scaled_matmul(Scaled(x, x_scales), Scaled(w, w_scales))

    program = compiled(
        "h100",
        run,
        ((ROWS, IN), jnp.float8_e4m3fn),
        ((ROWS, IN // 128), jnp.float32),
        ((IN, OUT), jnp.float8_e4m3fn, along),
        ((IN // 128, OUT // 128), jnp.float32, along),
    )
    assert program.memory_analysis().temp_size_in_bytes == 0


def written(text):
    """Yields (dtype, shape) of all that the entry computation writes to memory."""
    for line in computations(text)["ENTRY"]:
        made = re.match(r"(?:ROOT )?%\S+ = (.*?) (?:fusion|custom-call|copy)\(", line)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", made[1] if made else ""):
            yield dtype, [int(each) for each in dims.split(",")]
