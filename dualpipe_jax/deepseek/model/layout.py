"""Layers that differ, laid over stages of one structure.

All stages have the same number of slots, and a slot has room for every kind of layer
that any stage has there: an SPMD program knows one stage only. What a slot does is told
by numbers, so that room without a layer costs memory but no compute.

Shape suffixes: G stages, S slots of a stage, L layers.
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
    """Which layer stands in which slot of which stage.

    Attributes:
      layers: layers of each stage, in model order.
      first_k_dense_replace: these come first in the model.
    """

    layers: tuple[tuple[int, ...], ...]
    first_k_dense_replace: int

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Layout:
        """The inverse of `to_json`."""
        layers = tuple(tuple(int(layer) for layer in own) for own in value["layers"])
        return cls(layers, int(value["first_k_dense_replace"]))

    def to_json(self) -> dict[str, Any]:
        """As values that JSON knows."""
        return {
            "layers": [list(own) for own in self.layers],
            "first_k_dense_replace": self.first_k_dense_replace,
        }

    @property
    def num_slots(self) -> int:
        """Slots of a stage: layers of the longest one."""
        return max(map(len, self.layers))

    @functools.cached_property
    def layer_GS(self) -> np.ndarray:
        """[stages, slots] int32, the layer in each slot; -1 for padding."""
        rows = [own + (-1,) * (self.num_slots - len(own)) for own in self.layers]
        return np.array(rows, np.int32)

    @functools.cached_property
    def kind_GS(self) -> np.ndarray:
        """[stages, slots] int32, `NONE`, `DENSE` or `MOE`."""
        kind_GS = np.where(self.layer_GS < self.first_k_dense_replace, DENSE, MOE)
        return np.where(self.layer_GS < 0, NONE, kind_GS).astype(np.int32)

    @functools.cached_property
    def place(self) -> dict[int, tuple[int, ...]]:
        """Layer -> (stage, slot)."""
        return {
            layer: (stage, slot)
            for stage, own in enumerate(self.layers)
            for slot, layer in enumerate(own)
        }

    def kinds(self, slot: int) -> frozenset[int]:
        """The kinds that stages have in a slot."""
        return frozenset(self.kind_GS[:, slot].tolist())

    def slots_of(self, kind: int) -> list[int]:
        """Slots that have room for a kind of layer."""
        return [slot for slot in range(self.num_slots) if kind in self.kinds(slot)]

    def to_slot(self, values_L: jax.Array, slot: int, first: int = 0) -> jax.Array:
        """Values of layers, for the stages' layers in one slot.

        Args:
          values_L: [layers, ...], of layers `first` and those behind.
          slot: the slot.
          first: see above.

        Returns:
          [stages, ...]; those of some other layer where the stage has none that counts.
        """
        index = np.clip(self.layer_GS[:, slot] - first, 0, len(values_L) - 1)
        return values_L[index]

    def to_layers(
        self, slots: Sequence[jax.Array | None], first: int, last: int
    ) -> jax.Array:
        """The inverse of `to_slot`, over all slots.

        Args:
          slots: one [stages, ...] for each slot; None for a slot without such values.
          first: the first layer whose values are wanted.
          last: one behind the last.

        Returns:
          [last - first, ...].
        """
        wanted = [self.place[layer] for layer in range(first, last)]
        return jnp.stack([jnp.asarray(slots[slot])[stage] for stage, slot in wanted])


def relayout(slots: Sequence[PyTree], old: Layout, new: Layout) -> list[PyTree]:
    """Lays the parameters of one layout out anew, layer by layer.

    Args:
      slots: one pytree for each slot of `old`, leaves [stages, ...], with the parts
        of a kind of layer under the keys `"dense"` and `"moe"`.
      old: where the layers stand.
      new: where they are to stand; of the same model.

    Returns:
      The same for `new`, zeros in its padding.

    Raises:
      ValueError: the two are not of the same layers.
    """
    if _kinds_of_layers(old) != _kinds_of_layers(new):
        raise ValueError(
            f"the layers differ: {len(_kinds_of_layers(old))} of which "
            f"{old.first_k_dense_replace} are dense, against "
            f"{len(_kinds_of_layers(new))} of which {new.first_k_dense_replace} are."
        )

    def part_of(slot: int, name: str, kinds: frozenset[int]) -> PyTree:
        """One part of a new slot, from wherever its layers stood."""
        parts = []
        for layer, kind in zip(
            new.layer_GS[:, slot], new.kind_GS[:, slot], strict=True
        ):
            parts.append(None)
            if kind in kinds:
                stage, old_slot = old.place[int(layer)]
                part = slots[old_slot][name]
                parts[-1] = jax.tree.map(lambda leaf, at=stage: leaf[at], part)
        some = next(part for part in parts if part is not None)
        zeros = jax.tree.map(jnp.zeros_like, some)
        return jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(zeros if part is None else part for part in parts),
        )

    result = []
    for slot in range(new.num_slots):
        # What stands in every layer, then what belongs to one kind.
        names = set().union(*(tree.keys() for tree in slots)) - {"dense", "moe"}
        parts = {name: part_of(slot, name, frozenset({DENSE, MOE})) for name in names}
        for name, kind in (("dense", DENSE), ("moe", MOE)):
            if kind in new.kinds(slot):
                parts[name] = part_of(slot, name, frozenset({kind}))
        result.append(parts)
    return result


def _kinds_of_layers(layout: Layout) -> list[bool]:
    return [
        layer < layout.first_k_dense_replace for own in layout.layers for layer in own
    ]
