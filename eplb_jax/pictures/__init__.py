"""Placements and replays as text and figures.

Imports: placement, recordings.
"""

from eplb_jax.pictures.over_time import balancedness_figure, replay_figure
from eplb_jax.pictures.show import placement_figure, placement_text, replay_text

__all__ = [
    "balancedness_figure",
    "placement_figure",
    "placement_text",
    "replay_figure",
    "replay_text",
]
