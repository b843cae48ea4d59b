"""Files of engines: recorded loads, and placements that engines start with.

Nothing in a file is run: `pickles` reads plain data only.

Imports: placement.
"""

from eplb_jax.files.loads import Recording, read_loads
from eplb_jax.files.placements import (
    ENGINES as ENGINES,
    PlacementFile,
    engine_of as engine_of,
    read_placement,
    write_placement,
)
from eplb_jax.files.safetensors import (
    LENGTH_BYTES as LENGTH_BYTES,
    read_header as read_header,
)

__all__ = [
    "PlacementFile",
    "Recording",
    "read_loads",
    "read_placement",
    "write_placement",
]
