"""What a collective sends, over which link, and how long that takes.

Partition i is taken to be GPU `i % gpus_per_node` of node `i // gpus_per_node`, which
is how a mesh lies whose devices are in jax's order.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from dualpipe_jax.gpu.overlap.hlo import Computation, Module
from dualpipe_jax.gpu.overlap.instructions import Instruction
from dualpipe_jax.gpu.overlap.shapes import leaves, num_bytes
from dualpipe_jax.gpu.topology import Gpu

# Until the first byte arrives: one kernel and the flags of its peers, and a round trip
# through network cards. NCCL's small-message times lie around these.
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
    # Of a pair that XLA has made of a permute; `send` is its other end.
    "recv",
)
NVLINK, NETWORK, LOCAL = "nvlink", "network", "local"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device sends in one run of a collective; of all, the slowest one.

    Attributes:
      inside_bytes: to GPUs of its own node.
      between_bytes: to other nodes.
      seconds: the estimate, with latency.
      link: `nvlink`, `network`, or `local` where nothing leaves the device: what
        takes longest.
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
    """Times on the links of a GPU, with the groups that were parsed before.

    Args:
      module: whose collectives are asked for.
      gpu: whose links they use.
      gpus_per_node: devices in one node.
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
          where: the computation that it stands in.
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
            # Rows arrive in as many as leave, over the group: neither buffer can be
            # more than full on average. The offsets are not sent.
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
        # Rings, one for each GPU of a node, each leaving the node at another GPU.
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
                    f"{op.name}: source_target_pairs={text[:80]} are no pairs; pass "
                    "the module's text as XLA printed it."
                )
            pairs = numbers.reshape(-1, 2)
            moving = pairs[pairs[:, 0] != pairs[:, 1]] // self._per_node
            crossing = bool((moving[:, 0] != moving[:, 1]).any())
            self._pairs[text] = crossing if len(moving) else None
        crossing = self._pairs[text]
        if crossing is None:
            # To oneself, read and written once.
            seconds = 2 * total / self._gpu.memory_bandwidth
            return Traffic(0.0, 0.0, seconds + INSIDE_LATENCY_S, LOCAL, 1)
        inside, between = (0.0, total) if crossing else (total, 0.0)
        return self._time(inside, between, 2)

    def _group(self, op: Instruction) -> tuple[int, int]:
        """(size, members in one node) of the group whose members send the most."""
        text = op.get("replica_groups")
        if "device_ids" in op.attributes:  # of the mesh: `mesh[...], device_ids=...`
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
            # The most to send, and the fewest in a node: the slowest device decides.
            self._groups[text] = max(found, key=lambda each: (each[0], -each[1]))
        return self._groups[text]


def replica_groups(text: str, num_devices: int) -> list[np.ndarray]:
    """Reads replica groups in any of the syntaxes that XLA prints.

    Args:
      text: lists `{{0,1},{2,3}}`, iota `[2,4]<=[4,2]T(1,0)`, a mesh and its axes
        `mesh['a'=2,'b'=4] {'b'}`, or nothing for all devices in one group.
      num_devices: of the module.

    Returns:
      The members of each group.

    Raises:
      ValueError: the text is none of these.

    Examples:
      >>> [group.tolist() for group in replica_groups("[2,2]<=[2,2]T(1,0)", 4)]
      [[0, 2], [1, 3]]
      >>> [group.tolist() for group in replica_groups("mesh['a'=2,'b'=2] {'a'}", 4)]
      [[0, 2], [1, 3]]
    """
    if not re.search(r"\d", text):
        return [np.arange(num_devices)]
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if "<=" in text:
        return list(_iota(text).reshape(_dims(text)))
    if re.fullmatch(r"\{(\s*\{[\d,\s]*\}\s*,?)+\}", text):
        lists = re.findall(r"\{([\d,\s]+)\}", text)
        return [np.array(each.split(","), dtype=np.int64) for each in lists]
    if re.fullmatch(r"\{[\d,\s]+\}", text):
        return [np.array(text[1:-1].split(","), dtype=np.int64)]
    raise ValueError(
        f"replica_groups={text[:80]} are not understood; known are lists in braces, "
        "[groups,size]<=[dims]T(order), and mesh[...] {axes}."
    )


def _dims(text: str) -> list[int]:
    found = re.search(r"\[([\d,]+)\]", text)
    return [int(d) for d in found[1].split(",")] if found else []


def _iota(text: str) -> np.ndarray:
    """The devices of `...<=[dims]T(order)`, or of `[dims]T(order)`, flat."""
    text = text.rpartition("<=")[2]
    dims = _dims(text)
    order = re.search(r"T\(([\d,]+)\)", text)
    ids = np.arange(np.prod(dims)).reshape(dims)
    if order:
        ids = ids.transpose([int(axis) for axis in order[1].split(",")])
    return ids.reshape(-1)


def _mesh_groups(text: str) -> list[np.ndarray]:
    axes = {
        name: int(size) for name, size in re.findall(r"['\"]([^'\"]+)['\"]=(\d+)", text)
    }
    ids = np.arange(int(np.prod(list(axes.values()))))
    given = re.search(r"device_ids=\(([^{]*)\)", text)
    if given:
        flat = "[" not in given[1]
        ids = np.array(given[1].split(","), dtype=int) if flat else _iota(given[1])
    # `'a':(2)4` is the part of size 4 of axis a, behind a part of size 2.
    reduced = re.findall(
        r"['\"]([^'\"=]+)['\"](?::\((\d+)\)(\d+))?", text.rpartition("{")[2]
    )
    cuts = {name: (int(pre), int(size)) for name, pre, size in reduced if pre}
    dims, grouped = [], []
    for name, size in axes.items():
        wanted = any(name == each for each, _, _ in reduced)
        pre, part = cuts.get(name, (1, size if wanted else 1))
        dims += [pre, part, size // (pre * part)]
        grouped += [False, wanted, False]
    outer = [axis for axis, inside in enumerate(grouped) if not inside]
    inner = [axis for axis, inside in enumerate(grouped) if inside]
    size = int(np.prod([dims[axis] for axis in inner]))
    return list(ids.reshape(dims).transpose(outer + inner).reshape(-1, size))
