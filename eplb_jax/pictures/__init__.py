"""Placements and replays, as text and as figures.

Imports: placement, recordings.
"""

from eplb_jax.pictures.over_time import balancedness_figure, replay_figure
from eplb_jax.pictures.placed import placement_figure
from eplb_jax.pictures.text import placement_text, replay_text

__all__ = [
    "balancedness_figure",
    "placement_figure",
    "placement_text",
    "replay_figure",
    "replay_text",
]
