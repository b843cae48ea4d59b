"""The published schedules: one algorithm per file, each a short table of phases.

They live in a package of their own so that `dualpipe_jax.dualpipe` is the function,
whatever was imported before: importing a submodule binds its name in its package.

Imports: schedules. Without jax.
"""

from dualpipe_jax.schedules.generators.names import SCHEDULES as SCHEDULES
