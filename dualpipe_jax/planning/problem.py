"""A partition problem: what is divided into stages, and what counts as equal."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

# Loads within this fraction of each other are equal. Sums of 1e4 float64 terms err by
# less than 1e-12 of their value, and no cost is known to 1e-9.
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class PartitionProblem:
    """Layers to divide into contiguous stages, and the ranks that run the stages.

    Attributes:
      costs: [num_layers] float64, those of embedding and head included.
      weights: [num_ranks, num_stages] float64, a rank's time per unit of stage cost.
      cap: the most layers a stage may have.
    """

    costs: np.ndarray
    weights: np.ndarray
    cap: int

    @property
    def num_layers(self) -> int:
        return len(self.costs)

    @property
    def num_stages(self) -> int:
        return self.weights.shape[1]

    @functools.cached_property
    def before(self) -> np.ndarray:
        """[num_layers + 1]: the cost of all layers before each layer."""
        return np.concatenate([[0.0], np.cumsum(self.costs)])

    def stage_costs(self, sizes: np.ndarray) -> np.ndarray:
        """Returns costs of stages, [num_partitions, num_stages] like `sizes`."""
        ends = np.cumsum(sizes, axis=1)
        return self.before[ends] - self.before[ends - sizes]

    def loads(self, sizes: np.ndarray) -> np.ndarray:
        """Returns loads of ranks: [num_partitions, num_ranks]."""
        return self.stage_costs(sizes) @ self.weights.T


def outside_in(num_stages: int) -> list[int]:
    """Returns the stages in the order 0, S-1, 1, S-2, ..., in which ties are broken.

    Examples:
      >>> outside_in(5)
      [0, 4, 1, 3, 2]
    """
    return sorted(range(num_stages), key=lambda s: min(2 * s, 2 * (num_stages - s) - 1))
