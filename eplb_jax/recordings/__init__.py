"""Recorded loads: reading files of them, and replaying them against policies.

Imports: placement.
"""

from eplb_jax.recordings.files import Recording as Recording, read_loads
from eplb_jax.recordings.replays import Outcome, in_order as in_order, replay

__all__ = [
    "Outcome",
    "read_loads",
    "replay",
]
