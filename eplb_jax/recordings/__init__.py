"""Replays recorded loads against policies.

Imports: placement, files.
"""

from eplb_jax.recordings.replays import (
    Outcome,
    in_order as in_order,
    replay,
    with_load as with_load,
)

__all__ = [
    "Outcome",
    "replay",
]
