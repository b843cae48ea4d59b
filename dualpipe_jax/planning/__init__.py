"""Before a run: which layers each stage gets, and which schedule fits and is fastest.

Imports: schedules, schedules.generators, lowering, pictures. Without jax.
"""

from dualpipe_jax.planning.choose import rank_schedules
from dualpipe_jax.planning.memory_use import MemoryUse, Remat, StageMemory
from dualpipe_jax.planning.partition import Partition, partition_layers
from dualpipe_jax.planning.ranking import RankedSchedule, Ranking

__all__ = [
    "MemoryUse",
    "Partition",
    "RankedSchedule",
    "Ranking",
    "Remat",
    "StageMemory",
    "partition_layers",
    "rank_schedules",
]
