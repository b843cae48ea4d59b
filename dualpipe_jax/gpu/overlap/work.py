"""Estimates what an instruction costs a GPU: FLOPs, bytes, and a roofline's seconds."""

from __future__ import annotations

import dataclasses

from dualpipe_jax.gpu.gpus import Gpu
from dualpipe_jax.gpu.overlap import flops
from dualpipe_jax.gpu.overlap.flops import Flops
from dualpipe_jax.gpu.overlap.hlo import Computation, Module
from dualpipe_jax.gpu.overlap.instructions import Instruction
from dualpipe_jax.gpu.overlap.shapes import num_bytes

# From the end of one kernel to the start of the next, in a stream that is never empty.
KERNEL_LATENCY_S = 1.5e-6

# Instructions that run nothing.
FREE = frozenset(
    {
        "add-dependency",
        "after-all",
        "bitcast",
        "constant",
        "domain",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "recv",
        "replica-id",
        "send",
        "tuple",
    }
)


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """The work of one kernel or of several.

    Attributes:
      seconds: by the roofline, with latencies.
      flops: of matrix products.
      gemm_seconds: of the kernels that have matrix products.
      num_bytes: read and written in the GPU's memory.
      kernels: number of kernels.
      gemms: number of those with matrix products.
    """

    seconds: float = 0.0
    flops: float = 0.0
    gemm_seconds: float = 0.0
    num_bytes: float = 0.0
    kernels: float = 0.0
    gemms: float = 0.0

    def __add__(self, other: KernelWork) -> KernelWork:
        return KernelWork(
            *(a + b for a, b in zip(self._values, other._values, strict=True))
        )

    def __mul__(self, times: float) -> KernelWork:
        return KernelWork(*(times * value for value in self._values))

    @property
    def _values(self) -> tuple[float, ...]:
        return (
            self.seconds,
            self.flops,
            self.gemm_seconds,
            self.num_bytes,
            self.kernels,
            self.gemms,
        )


class Roofline:
    """Costs of a module's instructions on a GPU.

    Args:
      module: the module.
      gpu: the GPU.
      efficiency: fraction of its peaks, of compute and of memory, that kernels reach.

    Attributes:
      unknown: custom calls of unknown FLOPs, which count as zero FLOPs.
    """

    def __init__(self, module: Module, gpu: Gpu, efficiency: float):
        self._module, self._gpu, self._efficiency = module, gpu, efficiency
        self._fused: dict[str, tuple[Flops, float]] = {}
        self.unknown: set[str] = set()

    def kernel(self, op: Instruction, where: Computation) -> KernelWork:
        """Returns the work of an instruction that runs as one kernel, or as none."""
        opcode = op.opcode.removesuffix("-start")
        if opcode in FREE:
            return KernelWork()
        if opcode == "fusion":
            products, moved = self._fusion(op.called("calls")[0])
        else:
            products, moved = self._products(op, where), _moved(op, where)
        seconds = KERNEL_LATENCY_S + max(
            products.as_bf16 / (self._gpu.bf16_flops * self._efficiency),
            moved / (self._gpu.memory_bandwidth * self._efficiency),
        )
        gemm = products.count > 0
        return KernelWork(
            seconds, products.count, seconds * gemm, moved, 1.0, float(gemm)
        )

    def _products(self, op: Instruction, where: Computation) -> Flops:
        found = flops.of(op, where, self._gpu.has_fp8)
        if found is None:
            self.unknown.add(flops.name(op))
        return found or Flops()

    def _fusion(self, name: str) -> tuple[Flops, float]:
        if name not in self._fused:
            fused = self._module[name]
            moved = sum(
                _read(parameter, fused) for parameter in fused.parameters.values()
            )
            moved += _written(fused.root, fused)
            self._fused[name] = self._inside(fused), moved
        return self._fused[name]

    def _inside(self, fused: Computation) -> Flops:
        total = Flops()
        for op in fused.instructions:
            if op.opcode in ("fusion", "call"):
                for name in op.called("calls", "to_apply"):
                    total += self._inside(self._module[name])
            else:
                total += self._products(op, fused)
        return total


def _moved(op: Instruction, where: Computation) -> float:
    shapes = [num_bytes(shape) for shape in where.operand_shapes(op)]
    result = num_bytes(op.shape)
    if op.opcode in ("dynamic-slice", "slice"):
        return 2.0 * result
    if op.opcode == "gather":
        return 2.0 * result + shapes[1]
    if op.opcode == "dynamic-update-slice":
        return 2.0 * shapes[1]
    if op.opcode == "scatter":
        return 3.0 * shapes[-1] + sum(shapes[len(shapes) // 2 : -1])
    if op.opcode == "copy-start":  # its result names both buffers
        return 2.0 * shapes[0]
    return float(sum(shapes) + result)


_VIEWS = ("bitcast", "reshape", "get-tuple-element", "tuple")


def _read(parameter: Instruction, fused: Computation) -> float:
    """Returns the bytes a fusion reads of a parameter; of a buffer, what it slices."""
    whole, read = num_bytes(parameter.shape), 0.0
    pending, seen = [parameter], set()
    while pending:
        value = pending.pop()
        if value.name in seen:
            continue
        seen.add(value.name)
        if value.is_root and value.opcode != "tuple" and value is not parameter:
            return whole
        for user in fused.users.get(value.name, []):
            first = user.operands[0] == value.name
            if user.opcode in ("dynamic-slice", "slice", "gather") and first:
                read += num_bytes(user.shape)
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                continue  # in place
            elif user.opcode in _VIEWS and not user.is_root:
                pending.append(user)
            else:
                return whole
    return min(read, whole)


def _written(root: Instruction, fused: Computation) -> float:
    """Returns the bytes that a fusion writes; of a buffer in place, the update."""
    if root.opcode == "tuple":
        return sum(_written(fused.by_name[name], fused) for name in root.operands)
    made = fused.source(root.name) or root
    if made.opcode == "dynamic-update-slice":
        return float(num_bytes(fused.operand_shapes(made)[1]))
    if made.opcode == "scatter":
        return 2.0 * num_bytes(fused.operand_shapes(made)[-1])
    return float(num_bytes(root.shape))
