"""Recorded loads: reads files of them, and replays them against policies.

Imports: placement.
"""

from eplb_jax.recordings.files import Recording, read_loads
from eplb_jax.recordings.replays import (
    Outcome,
    in_order as in_order,
    replay,
    with_load as with_load,
)

__all__ = [
    "Outcome",
    "Recording",
    "read_loads",
    "replay",
]
