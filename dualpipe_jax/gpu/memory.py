"""What a compiled step needs of a GPU's memory, and whether that is what it should be.

XLA says how many bytes a step's temporaries take (`compiled.memory_analysis()`); the
program says which buffers it keeps. The report compares the two: anything beyond the
buffers and one task's working set has been copied, or is kept longer than needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from html import escape
from typing import Any

import jax

from dualpipe_jax.executor import BufferBytes, num_bytes
from dualpipe_jax.gpu.gpus import Gpu, find_gpu
from dualpipe_jax.pictures import format_bytes

__all__ = ["BufferBytes", "MemoryReport", "bytes_of_shards", "memory_report"]


@dataclasses.dataclass(frozen=True, repr=False)
class MemoryReport:
    """Bytes on one device. `print` shows them as a table.

    Attributes:
      arguments: of the step's arguments, by name; `other` is the rest of XLA's total.
      outputs: of results that do not take an argument's place.
      temporaries: of all values that live only within the step, as XLA lays them out.
      code: of the compiled kernels.
      buffers: what the program keeps, or None.
      working_set: temporaries of the most expensive task, compiled alone; or None.
      capacity: of the device, or None.

    Examples:
      >>> buffers = BufferBytes(40, 5, 9, 3, 2, 8, 4, 1)
      >>> report = MemoryReport({"parameters": 8}, 0, 84, 0, buffers, 16, 100)
      >>> report.expected, report.ratio, report.spare
      (80, 1.05, 8)
    """

    arguments: dict[str, int]
    outputs: int
    temporaries: int
    code: int
    buffers: BufferBytes | None = None
    working_set: int | None = None
    capacity: int | None = None

    @property
    def total(self) -> int:
        """Arguments, results, temporaries and code."""
        held = sum(self.arguments.values())
        return held + self.outputs + self.temporaries + self.code

    @property
    def spare(self) -> int | None:
        """Bytes of the device that are left; negative where the step does not fit."""
        return None if self.capacity is None else self.capacity - self.total

    @property
    def expected(self) -> int | None:
        """What the temporaries should be: buffers and one task's working set."""
        if self.buffers is None or self.working_set is None:
            return None
        return self.buffers.total + self.working_set

    @property
    def ratio(self) -> float | None:
        """Temporaries over what they should be."""
        return self.temporaries / self.expected if self.expected else None

    def to_json(self) -> str:
        """Returns the attributes and what follows from them as one object; in bytes."""
        derived = ("total", "spare", "expected", "ratio")
        value = dataclasses.asdict(self) | {
            name: getattr(self, name) for name in derived
        }
        return json.dumps(value, indent=2)

    def __str__(self) -> str:
        rows = [("arguments", sum(self.arguments.values()), "")]
        rows += [(f"  {name}", size, "") for name, size in self.arguments.items()]
        if self.outputs:
            rows.append(("results", self.outputs, ""))
        note = "" if self.ratio is None else f"{self.ratio:.2f} x the rows below"
        rows.append(("temporaries", self.temporaries, note))
        rows += self._rows_of_buffers()
        if self.working_set is not None:
            note = "of the costliest task alone"
            rows.append(("  working set", self.working_set, note))
        if self.code:
            rows.append(("code", self.code, ""))
        rows.append(("total", self.total, self._verdict))
        sizes = [format_bytes(size) for _, size, _ in rows]
        widths = max(len(name) for name, _, _ in rows), max(map(len, sizes))
        return "\n".join(
            f"{name:{widths[0]}}  {size:>{widths[1]}}  {note}".rstrip()
            for (name, _, note), size in zip(rows, sizes, strict=True)
        )

    def __repr__(self) -> str:
        return f"MemoryReport({format_bytes(self.total)} {self._verdict})"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def _rows_of_buffers(self) -> list[tuple[str, int, str]]:
        held = self.buffers
        if held is None:
            return []
        rows = [
            ("  activation slots", held.residuals, f"{held.num_slots} slots"),
            (
                "  wgrad residuals",
                held.wgrad_residuals,
                f"{held.num_wgrad_residual_slots} slots",
            ),
            ("  messages", held.messages, ""),
            ("  gradients", held.gradients, ""),
            ("  parameters", held.parameters, "as the stages compute with them"),
            ("  outputs", held.outputs, ""),
        ]
        return [row for row in rows if row[1]]

    @property
    def _verdict(self) -> str:
        if self.capacity is None or self.spare is None:
            return ""
        of = f"of {format_bytes(self.capacity)}"
        if self.spare < 0:
            return f"{of}: {format_bytes(-self.spare)} too much"
        return f"{of}: {format_bytes(self.spare)} to spare"


def memory_report(
    compiled: Any,
    *,
    buffers: BufferBytes | None = None,
    task: Any = None,
    arguments: Mapping[str, Any] | None = None,
    gpu: str | Gpu | None = None,
) -> MemoryReport:
    """Reports where a compiled step's memory goes.

    Args:
      compiled: a `jax.stages.Compiled`, for any backend with a memory analysis.
      buffers: what the program keeps: `step.buffers(...)` of
        `pipeline_value_and_grad`.
      task: its costliest task, compiled: `step.lower_costliest_task(...).compile()`.
      arguments: trees of the step's arguments by name, as arrays or as shapes with
        shardings; one device's shards are counted.
      gpu: the GPU whose memory the step should fit: a key of `dualpipe_jax.gpu.GPUS`,
        or a `Gpu`.

    Returns:
      A `MemoryReport`.

    Raises:
      ValueError: the backend has no memory analysis, `gpu` is unknown, or `arguments`
        are larger than those of the compiled step.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dualpipe_jax import PipelineParams, dualpipe, pipeline_value_and_grad
      >>> step = pipeline_value_and_grad(
      ...     lambda w, x: jnp.tanh(x @ w),
      ...     lambda head, y, target: jnp.mean((y - target) ** 2),
      ...     schedule=dualpipe(num_ranks=2, num_microbatches=4),
      ...     mesh=jax.make_mesh((2,), ("pp",), devices=jax.devices()[:2]),
      ... )
      >>> args = PipelineParams(jnp.ones((2, 64, 64))), *(jnp.ones((4, 8, 64)),) * 2
      >>> report = memory_report(
      ...     step.lower(*args).compile(),
      ...     buffers=step.buffers(*args),
      ...     task=step.lower_costliest_task(*args).compile(),
      ... )
      >>> report.buffers.num_slots, report.buffers.parameters
      (3, 32768)
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(
            "the compiled step's backend has no memory analysis; compile for GPUs (see "
            "dualpipe_jax.gpu_mesh) or for CPUs."
        )
    capacity = None if gpu is None else find_gpu(gpu).memory_size
    named = {name: bytes_of_shards(tree) for name, tree in (arguments or {}).items()}
    other = analysis.argument_size_in_bytes - sum(named.values())
    if other < 0:
        raise ValueError(
            f"arguments take {format_bytes(sum(named.values()))} per device, more than "
            f"the {format_bytes(analysis.argument_size_in_bytes)} of the compiled "
            "step; pass those that it was lowered for."
        )
    return MemoryReport(
        arguments=named | ({"other": other} if other else {}),
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        buffers=buffers,
        working_set=None if task is None else task.memory_analysis().temp_size_in_bytes,
        capacity=capacity,
    )


def bytes_of_shards(tree: Any) -> int:
    """Returns the bytes of one device's shards of a tree's arrays."""

    def part(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return leaf
        return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)

    return num_bytes(jax.tree.map(part, tree))
