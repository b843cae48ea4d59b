"""Estimates what a collective sends, over which link, and how long that takes.

Partition i is taken to be GPU `i % gpus_per_node` of node `i // gpus_per_node`, as in a
mesh whose devices are in jax's order.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from dualpipe_jax.gpu.gpus import Gpu
from dualpipe_jax.gpu.overlap.groups import replica_groups
from dualpipe_jax.gpu.overlap.hlo import Computation, Module
from dualpipe_jax.gpu.overlap.instructions import Instruction
from dualpipe_jax.gpu.overlap.shapes import leaves, num_bytes

# Until the first byte arrives: one kernel and its peers' flags, or a round trip through
# network cards. NCCL's times for small messages are close to these.
INSIDE_LATENCY_S = 10e-6
BETWEEN_LATENCY_S = 20e-6

KINDS = (
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-broadcast",
    # XLA makes a pair of `send` and `recv` of some permutes.
    "recv",
)
NVLINK, NETWORK, LOCAL = "nvlink", "network", "local"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What the slowest device sends in one run of a collective.

    Attributes:
      inside_bytes: sent to GPUs of its own node.
      between_bytes: sent to other nodes.
      seconds: the estimate, with latency.
      link: the one that takes longest: `nvlink`, `network`, or `local` where nothing
        leaves the device.
      group_size: devices that communicate with each other; 2 for a permute.
    """

    inside_bytes: float
    between_bytes: float
    seconds: float
    link: str
    group_size: int

    @property
    def num_bytes(self) -> float:
        return self.inside_bytes + self.between_bytes


class Links:
    """Times of a module's collectives on the links of a GPU; caches parsed groups.

    Args:
      module: the module.
      gpu: the GPU.
      gpus_per_node: devices per node.
    """

    def __init__(self, module: Module, gpu: Gpu, gpus_per_node: int):
        self._module, self._gpu, self._per_node = module, gpu, gpus_per_node
        self._groups: dict[str, tuple[int, int]] = {}
        self._pairs: dict[str, bool | None] = {}

    def traffic(self, kind: str, op: Instruction, where: Computation) -> Traffic:
        """Estimates one collective.

        Args:
          kind: one of `KINDS`.
          op: the instruction with the operands and the groups.
          where: its computation.
        """
        shapes = where.operand_shapes(op)
        if kind == "collective-permute":
            pairs = op.get("source_target_pairs")
            return self._permute(op, pairs, sum(map(num_bytes, shapes)))
        if kind == "recv":
            pairs = op.get("frontend_attributes").partition("source_target_pairs=")[2]
            return self._permute(op, pairs, leaves(op.shape)[0].num_bytes)
        size, in_node = self._group(op)
        if kind == "ragged-all-to-all":
            # As many rows arrive in the group as leave, so neither buffer can be more
            # than full on average. The offsets are not sent.
            total = float(min(num_bytes(shapes[0]), num_bytes(shapes[1])))
        else:
            total = float(sum(map(num_bytes, shapes)))
        if kind in ("all-to-all", "ragged-all-to-all"):
            inside = total * (in_node - 1) / size
            return self._time(inside, total * (size - in_node) / size, size)
        sent = {
            "all-gather": total * (size - 1),
            "all-reduce": 2 * total * (size - 1) / size,
            "reduce-scatter": total * (size - 1) / size,
            "collective-broadcast": total if size > 1 else 0.0,
        }[kind]
        # Rings, one per GPU of a node, each of which leaves the node at its own GPU.
        between = sent / in_node if in_node < size else 0.0
        return self._time(sent - between, between, size)

    def _time(self, inside: float, between: float, size: int) -> Traffic:
        on_nvlink = inside / self._gpu.nvlink_bandwidth
        on_network = between / self._gpu.network_bandwidth
        if size == 1:
            return Traffic(0.0, 0.0, INSIDE_LATENCY_S, LOCAL, size)
        return Traffic(
            inside,
            between,
            max(on_nvlink, on_network)
            + (BETWEEN_LATENCY_S if between else INSIDE_LATENCY_S),
            NETWORK if on_network > on_nvlink else NVLINK,
            size,
        )

    def _permute(self, op: Instruction, text: str, total: float) -> Traffic:
        if text not in self._pairs:
            numbers = np.array(re.findall(r"\d+", text), dtype=np.int64)
            if len(numbers) % 2:
                raise ValueError(
                    f"{op.name}: source_target_pairs={text[:80]} are not pairs; pass "
                    "the module's text as XLA printed it."
                )
            pairs = numbers.reshape(-1, 2)
            moving = pairs[pairs[:, 0] != pairs[:, 1]] // self._per_node
            between_nodes = bool((moving[:, 0] != moving[:, 1]).any())
            self._pairs[text] = between_nodes if len(moving) else None
        between_nodes = self._pairs[text]
        if between_nodes is None:
            # Every device sends to itself: one read and one write.
            seconds = 2 * total / self._gpu.memory_bandwidth
            return Traffic(0.0, 0.0, seconds + INSIDE_LATENCY_S, LOCAL, 1)
        inside, between = (0.0, total) if between_nodes else (total, 0.0)
        return self._time(inside, between, 2)

    def _group(self, op: Instruction) -> tuple[int, int]:
        """Returns (size, members per node) of the group whose members send the most."""
        text = op.get("replica_groups")
        if "device_ids" in op.attributes:  # of a mesh: `mesh[...], device_ids=...`
            text += f", device_ids={op.get('device_ids')}"
        if text not in self._groups:
            found = [
                (
                    len(group),
                    int(
                        np.unique(group // self._per_node, return_counts=True)[1].min()
                    ),
                )
                for group in replica_groups(text, self._module.num_devices)
            ]
            # The slowest device decides: the largest group, the fewest of it per node.
            self._groups[text] = max(found, key=lambda each: (each[0], -each[1]))
        return self._groups[text]
