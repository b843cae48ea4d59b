"""Counts an instruction's FLOPs: products, convolutions and calls of libraries."""

from __future__ import annotations

import dataclasses
import math
import re

from dualpipe_jax.gpu.overlap.hlo import Computation
from dualpipe_jax.gpu.overlap.instructions import Instruction
from dualpipe_jax.gpu.overlap.shapes import Array, leaves


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products.

    Attributes:
      count: multiplications and additions.
      as_bf16: the number of bfloat16 operations that take the tensor cores as long.
    """

    count: float = 0.0
    as_bf16: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.count + other.count, self.as_bf16 + other.as_bf16)


def of(op: Instruction, where: Computation, has_fp8: bool) -> Flops | None:
    """Counts the FLOPs of an instruction other than a fusion.

    Args:
      op: the instruction.
      where: its computation.
      has_fp8: whether eight-bit floats are multiplied at twice bfloat16's rate.

    Returns:
      None for a custom call that may multiply matrices, if its shapes do not say.
    """
    opcode = op.opcode.removesuffix("-start")
    if opcode not in ("dot", "convolution", "custom-call", "ragged-dot"):
        return Flops()
    operands = [leaves(shape) for shape in where.operand_shapes(op)]
    arrays = [found[0] for found in operands if found]
    results = leaves(op.shape)
    if not results or len(arrays) < 2:
        return Flops()
    result = results[0]
    if opcode == "dot":
        count = 2 * result.size * _along(arrays[0], op.dims("lhs_contracting_dims"))
        algorithm = op.get("algorithm")
    elif opcode == "ragged-dot":
        count, algorithm = _grouped(result, arrays), ""
    elif opcode == "convolution":
        count, algorithm = _convolution(op, arrays[1], result), ""
    else:
        count, algorithm = _custom(op, arrays, results), ""
    if count is None:
        return None
    # Kernels may take integers, such as the sizes of groups, before what they multiply.
    factors = [array for array in arrays if "f" in array.dtype] or arrays
    return Flops(count, count * _slowness(factors[:2], algorithm, has_fp8))


def name(op: Instruction) -> str:
    """Returns a custom call's target, with the kernel's name if it has one."""
    target = op.get("custom_call_target").strip('"') or op.opcode
    kernel = re.search(r'\bname = "([^"]*)"', op.get("backend_config"))
    return f"{target} ({kernel[1]})" if kernel else target


def _along(array: Array, dims: tuple[int, ...]) -> int:
    return math.prod(array.dims[dim] for dim in dims)


def _slowness(arrays: list[Array], algorithm: str, has_fp8: bool) -> float:
    """Returns the time of one operation over that of a bfloat16 operation."""
    found = re.search(r"dot_(\w+?)_\w+?(?:_x(\d))?$", algorithm)
    if found:
        times = float(found[2] or 1)
        by_name = {"bf16": 1.0, "f16": 1.0, "tf32": 2.0, "f64": 16.0}
        return times * by_name.get(found[1], 2.0)
    bits = max(array.bits for array in arrays)
    if bits >= 64:
        return 16.0
    if bits >= 32:
        return 2.0
    if bits == 16:
        return 1.0
    is_float = any(array.dtype.startswith("f") for array in arrays)
    return 1.0 if is_float and not has_fp8 else 0.5


def _convolution(op: Instruction, kernel: Array, result: Array) -> float | None:
    labels = re.search(r"\w+_(\w+)->\w+", op.get("dim_labels"))
    if labels is None or "o" not in labels[1]:
        return None
    return 2.0 * result.size * kernel.size / kernel.dims[labels[1].index("o")]


def _custom(
    op: Instruction, arrays: list[Array], results: tuple[Array, ...]
) -> float | None:
    result = results[0]
    target = op.get("custom_call_target").strip('"')
    if target.startswith("__cublas$"):
        numbers = _find(op.backend_config, "dot_dimension_numbers") or {}
        dims = numbers.get("lhs_contracting_dimensions", [])
        return 2.0 * result.size * _along(arrays[0], tuple(map(int, dims)))
    if target.startswith("__cudnn$fmha"):
        return _attention(op, target, arrays[0])
    if target.startswith("__cudnn$conv"):
        if "BackwardInput" in target:  # dy and the kernel make dx
            return _convolution(op, arrays[1], arrays[0])
        if "BackwardFilter" in target:  # x and dy make dw
            return _convolution(op, result, arrays[1])
        return _convolution(op, arrays[1], result)
    if not _is_kernel(target):
        return 0.0
    if re.search("attention|flash|mha", op.op_name, re.I):
        return _attention_kernel(arrays, results)
    return _grouped(result, arrays)


def _is_kernel(target: str) -> bool:
    """Returns whether a custom call is a hand-written kernel, which may multiply."""
    target = target.lower()
    return any(word in target for word in ("triton", "mosaic", "pallas", "ragged"))


def _grouped(result: Array, arrays: list[Array]) -> float | None:
    """Counts a grouped product by its shapes, such as a Triton kernel of tokamax.

    [m, k] and [groups, k, n] make [m, n]; for the weights [m, k] and [m, n] make
    [groups, k, n].
    """
    matrices = [array.dims for array in arrays if array.bits >= 4]
    rank2 = [dims for dims in matrices if len(dims) == 2]
    rank3 = [dims for dims in matrices if len(dims) == 3]
    if len(result.dims) == 2:
        m, n = result.dims
        for lhs in rank2:
            if lhs[0] == m and any(
                sorted(rhs[1:]) == sorted((lhs[1], n)) for rhs in rank3
            ):
                return 2.0 * m * n * lhs[1]
    if len(result.dims) == 3:
        _, k, n = result.dims
        for first in rank2:
            for second in rank2:
                # Either may be transposed: the rows are the size that both have.
                rows = {first[0], first[1]} & {second[0], second[1]}
                for m in rows:
                    if {first, second} <= {(m, k), (m, n), (k, m), (n, m)} and (
                        sorted((math.prod(first) // m, math.prod(second) // m))
                        == sorted((k, n))
                    ):
                        return 2.0 * m * k * n
    return None


def _attention(op: Instruction, target: str, query: Array) -> float | None:
    """Counts cuDNN attention: two products forward, five backward; half if causal."""
    config = _find(op.backend_config, "cudnn_fmha_backend_config") or {}
    tensor = _find(config, "intermediate_tensor_shape") or {}
    scores = [int(size) for size in tensor.get("dimensions", [])]
    if len(scores) != 4:
        return None
    head_dim = query.size / math.prod(scores[:3])
    products = 5 if "Backward" in target else 2
    masked = 0.5 if "CAUSAL" in str(config.get("mask_type", "")) else 1.0
    return products * 2.0 * math.prod(scores) * head_dim * masked


def _attention_kernel(arrays: list[Array], results: tuple[Array, ...]) -> float | None:
    """Counts an attention kernel by its shapes: queries, keys and values come first.

    Two products forward; five backward, which recomputes the scores. Of the sequence
    and the heads, the sequence is taken to be the longer dimension. Attention over as
    many keys as queries is taken to be causal, which halves the work.
    """
    if len(arrays) < 3 or len({len(array.dims) for array in arrays[:3]}) > 1:
        return None
    q, k, v = (array.dims for array in arrays[:3])
    if len(q) < 3 or q[-1] != k[-1] or k[:-1] != v[:-1]:
        return None
    at = -3 if q[-3] >= q[-2] else -2
    scores = math.prod(q[:-1]) * k[at] * (0.5 if q[at] == k[at] else 1.0)
    if [array.dims for array in results[:3]] == [q, k, v]:
        return 2.0 * scores * (3 * q[-1] + 2 * v[-1])
    if results[0].dims[:-1] == q[:-1] and results[0].dims[-1] == v[-1]:
        return 2.0 * scores * (q[-1] + v[-1])
    return None


def _find(config: object, key: str):
    """Returns the value of a key at any depth of nested dicts, else None."""
    if isinstance(config, dict):
        if key in config:
            return config[key]
        for value in config.values():
            found = _find(value, key)
            if found is not None:
                return found
    return None
