"""The published schedules: one algorithm per file, most a short table of phases.

They have their own package so that `dualpipe_jax.dualpipe` is always the function:
importing a submodule binds its name in its package.

Imports: schedules. Without jax.
"""

from dualpipe_jax.schedules.generators.names import (
    SCHEDULES as SCHEDULES,
    with_stages_per_rank as with_stages_per_rank,
)
from dualpipe_jax.schedules.generators.sizes import check_size as check_size
