"""How layers of different kinds are laid out over stages of one structure.

An SPMD program has one structure for all stages. So every stage has the same number of
layer positions, and a position has room for each kind of layer that any stage has
there. Arrays of numbers tell a stage which kind of layer to run at a position; a
position without a layer (padding) takes memory but no compute.

Shape suffixes: see `dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NONE, DENSE, MOE = range(3)

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which layer is at which position of which stage.

    Attributes:
      layers: layers of each stage, in model order.
      first_k_dense_replace: how many layers at the start of the model are dense.
    """

    layers: tuple[tuple[int, ...], ...]
    first_k_dense_replace: int

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Layout:
        """Reads what `to_json` returned."""
        layers = tuple(tuple(int(layer) for layer in own) for own in value["layers"])
        return cls(layers, int(value["first_k_dense_replace"]))

    def to_json(self) -> dict[str, Any]:
        """Returns the layout as a JSON object."""
        return {
            "layers": [list(own) for own in self.layers],
            "first_k_dense_replace": self.first_k_dense_replace,
        }

    @property
    def num_layer_positions(self) -> int:
        """Layer positions of a stage: as many as the longest stage has layers."""
        return max(map(len, self.layers))

    @functools.cached_property
    def layer_GP(self) -> np.ndarray:
        """[stages, layer positions] int32, the layer at each position; -1: padding."""
        rows = [
            own + (-1,) * (self.num_layer_positions - len(own)) for own in self.layers
        ]
        return np.array(rows, np.int32)

    @functools.cached_property
    def kind_GP(self) -> np.ndarray:
        """[stages, layer positions] int32, `NONE`, `DENSE` or `MOE`."""
        kind_GP = np.where(self.layer_GP < self.first_k_dense_replace, DENSE, MOE)
        return np.where(self.layer_GP < 0, NONE, kind_GP).astype(np.int32)

    @functools.cached_property
    def place(self) -> dict[int, tuple[int, ...]]:
        """Layer -> (stage, layer position)."""
        return {
            layer: (stage, position)
            for stage, own in enumerate(self.layers)
            for position, layer in enumerate(own)
        }

    def kinds(self, position: int) -> frozenset[int]:
        """Returns the kinds of layers that stages have at a position."""
        return frozenset(self.kind_GP[:, position].tolist())

    def positions_of(self, kind: int) -> list[int]:
        """Returns the positions at which some stage has a kind of layer."""
        every = range(self.num_layer_positions)
        return [position for position in every if kind in self.kinds(position)]

    def to_position(
        self, values_L: jax.Array, position: int, first: int = 0
    ) -> jax.Array:
        """Selects values of layers for the stages' layers at one position.

        Args:
          values_L: [layers, ...], of layer `first` and those after it.
          position: the layer position.
          first: the first layer that has values.

        Returns:
          [stages, ...]; for a stage whose layer has no value, that of another layer.
        """
        index = np.clip(self.layer_GP[:, position] - first, 0, len(values_L) - 1)
        return values_L[index]

    def to_layers(
        self, values: Sequence[jax.Array | None], first: int, last: int
    ) -> jax.Array:
        """Inverts `to_position`, over all positions.

        Args:
          values: for each position [stages, ...]; None for a position without values.
          first: the first layer to return values of.
          last: one past the last.

        Returns:
          [last - first, ...].
        """
        wanted = [self.place[layer] for layer in range(first, last)]
        rows = [jnp.asarray(values[position])[stage] for stage, position in wanted]
        return jnp.stack(rows)


def relayout(trees: Sequence[PyTree], old: Layout, new: Layout) -> list[PyTree]:
    """Moves the parameters of one layout to another, layer by layer.

    Args:
      trees: one pytree for each layer position of `old`, leaves [stages, ...], with the
        parts of a kind of layer under the keys `"dense"` and `"moe"`.
      old: the layout of `trees`.
      new: another layout of the same model.

    Returns:
      The same for `new`, with zeros in its padding.

    Raises:
      ValueError: the two layouts are of different layers.
    """
    if _kinds_of_layers(old) != _kinds_of_layers(new):
        raise ValueError(
            f"the layers differ: {len(_kinds_of_layers(old))} of which "
            f"{old.first_k_dense_replace} are dense, against "
            f"{len(_kinds_of_layers(new))} of which {new.first_k_dense_replace} are."
        )

    def part_of(position: int, name: str, kinds: frozenset[int]) -> PyTree:
        """Collects one part of a new position from the old places of its layers."""
        parts = []
        for layer, kind in zip(
            new.layer_GP[:, position], new.kind_GP[:, position], strict=True
        ):
            parts.append(None)
            if kind in kinds:
                stage, old_position = old.place[int(layer)]
                part = trees[old_position][name]
                parts[-1] = jax.tree.map(lambda leaf, at=stage: leaf[at], part)
        some = next(part for part in parts if part is not None)
        zeros = jax.tree.map(jnp.zeros_like, some)
        return jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(zeros if part is None else part for part in parts),
        )

    result = []
    for position in range(new.num_layer_positions):
        # The parts of every layer, then those of one kind.
        names = set().union(*(tree.keys() for tree in trees)) - {"dense", "moe"}
        both = frozenset({DENSE, MOE})
        parts = {name: part_of(position, name, both) for name in names}
        for name, kind in (("dense", DENSE), ("moe", MOE)):
            if kind in new.kinds(position):
                parts[name] = part_of(position, name, frozenset({kind}))
        result.append(parts)
    return result


def _kinds_of_layers(layout: Layout) -> list[bool]:
    return [
        layer < layout.first_k_dense_replace for own in layout.layers for layer in own
    ]
