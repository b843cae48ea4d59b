"""A minimum vertex cut: which values to keep so that the rest can be recomputed.

Values are vertices with a price (their bytes); recomputing a value needs its operands.
The cheapest set of values that separates what only the first program can compute from
what the second program needs is a minimum vertex cut, found here with Dinic's algorithm
for maximum flow. AOTAutograd's partitioner solves the same problem (Chen et al.,
min-cut rematerialization in PyTorch's functorch); this is an independent
implementation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping

_INFINITE = float("inf")


class VertexCut:
    """Collects vertices and edges, then finds the cheapest cut.

    Examples:
      A chain ``a -> b -> c`` in which only ``a`` cannot be recomputed and ``c`` is
      needed: the cheapest of the three is kept.

      >>> cut = VertexCut()
      >>> for name, price in [("a", 4), ("b", 2), ("c", 8)]:
      ...     cut.add(name, price)
      >>> cut.add_operand("a", "b")
      >>> cut.add_operand("b", "c")
      >>> cut.only_early("a")
      >>> cut.needed_late("c")
      >>> cut.solve()
      ({'b'}, {'c'})
    """

    def __init__(self) -> None:
        self._index: dict[Hashable, int] = {}
        # Vertex i is the edge 2i+2 -> 2i+3; 0 is the source and 1 the sink.
        self._adjacent: list[list[int]] = [[], []]
        self._head: list[int] = []
        self._capacity: list[float] = []

    def __contains__(self, vertex: Hashable) -> bool:
        return vertex in self._index

    def add(self, vertex: Hashable, price: float) -> None:
        """Adds a value that costs ``price`` to keep. Call once per value."""
        index = self._index[vertex] = len(self._index)
        self._adjacent += [[], []]
        self._edge(2 * index + 2, 2 * index + 3, price)

    def add_operand(self, operand: Hashable, vertex: Hashable) -> None:
        """Declares that recomputing ``vertex`` needs ``operand``."""
        self._edge(self._out(operand), self._in(vertex), _INFINITE)

    def only_early(self, vertex: Hashable) -> None:
        """Declares that ``vertex`` cannot be recomputed: it is kept or not needed."""
        self._edge(0, self._in(vertex), _INFINITE)

    def needed_late(self, vertex: Hashable) -> None:
        """Declares that ``vertex`` must be kept or recomputed."""
        self._edge(self._out(vertex), 1, _INFINITE)

    def solve(self) -> tuple[set[Hashable], set[Hashable]]:
        """Returns (values to keep, values to recompute), of minimal total price.

        Among cuts of equal price, chooses the one that recomputes least.
        """
        while (level := self._levels()) is not None:
            position = [0] * len(self._adjacent)
            while self._augment(level, position):
                pass
        late = self._reaches_sink()
        keep, recompute = set(), set()
        for vertex, index in self._index.items():
            if 2 * index + 2 in late:
                recompute.add(vertex)
            elif 2 * index + 3 in late:
                keep.add(vertex)
        return keep, recompute

    def _in(self, vertex: Hashable) -> int:
        return 2 * self._index[vertex] + 2

    def _out(self, vertex: Hashable) -> int:
        return 2 * self._index[vertex] + 3

    def _edge(self, tail: int, head: int, capacity: float) -> None:
        self._adjacent[tail].append(len(self._head))
        self._head.append(head)
        self._capacity.append(capacity)
        self._adjacent[head].append(len(self._head))
        self._head.append(tail)
        self._capacity.append(0)

    def _levels(self) -> list[int] | None:
        level = [-1] * len(self._adjacent)
        level[0] = 0
        queue = deque([0])
        while queue:
            node = queue.popleft()
            for edge in self._adjacent[node]:
                head = self._head[edge]
                if level[head] < 0 and self._capacity[edge] > 0:
                    level[head] = level[node] + 1
                    queue.append(head)
        return level if level[1] >= 0 else None

    def _augment(self, level: list[int], position: list[int]) -> bool:
        """Pushes flow along one path of the level graph; False if there is none."""
        path: list[int] = []
        node = 0
        while node != 1:
            edges = self._adjacent[node]
            while position[node] < len(edges):
                edge = edges[position[node]]
                head = self._head[edge]
                if self._capacity[edge] > 0 and level[head] == level[node] + 1:
                    break
                position[node] += 1
            else:
                if not path:
                    return False
                node = self._head[path.pop() ^ 1]
                position[node] += 1
                continue
            path.append(edge)
            node = head
        flow = min(self._capacity[edge] for edge in path)
        if flow == _INFINITE:
            raise ValueError("A value that cannot be kept is needed by both programs.")
        for edge in path:
            self._capacity[edge] -= flow
            self._capacity[edge ^ 1] += flow
        return True

    def _reaches_sink(self) -> set[int]:
        reached = {1}
        stack = [1]
        while stack:
            node = stack.pop()
            for edge in self._adjacent[node]:
                tail = self._head[edge]
                if tail not in reached and self._capacity[edge ^ 1] > 0:
                    reached.add(tail)
                    stack.append(tail)
        return reached


def cheapest_cut(
    prices: Mapping[Hashable, float],
    operands: Mapping[Hashable, Iterable[Hashable]],
    only_early: Iterable[Hashable],
    needed_late: Iterable[Hashable],
) -> tuple[set[Hashable], set[Hashable]]:
    """Returns (values to keep, values to recompute) at the lowest total price.

    Args:
      prices: the cost of keeping each value.
      operands: for each value that may be recomputed, the values this needs.
      only_early: values that may not be recomputed.
      needed_late: values that the second program reads.

    Returns:
      Two sets of keys of ``prices``.

    Examples:
      >>> cheapest_cut({"x": 8, "half": 4}, {"half": ["x"]}, ["x"], ["half"])
      ({'half'}, set())
    """
    cut = VertexCut()
    for vertex, price in prices.items():
        cut.add(vertex, price)
    for vertex, needs in operands.items():
        for operand in needs:
            cut.add_operand(operand, vertex)
    for vertex in only_early:
        cut.only_early(vertex)
    for vertex in needed_late:
        cut.needed_late(vertex)
    return cut.solve()
