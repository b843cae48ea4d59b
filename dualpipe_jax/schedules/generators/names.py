"""The published schedules by name, as in configs and on the command line."""

from __future__ import annotations

from collections.abc import Callable

from dualpipe_jax.schedules.generators.dualpipe import dualpipe
from dualpipe_jax.schedules.generators.dualpipev import dualpipev
from dualpipe_jax.schedules.generators.gpipe import gpipe
from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
from dualpipe_jax.schedules.generators.zb1p import zb1p
from dualpipe_jax.schedules.schedule import Schedule

# Name -> (num_ranks, num_microbatches) -> Schedule; 1F1B has two names.
SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
    "1f1b": one_f_one_b,
    "one_f_one_b": one_f_one_b,
    "zb1p": zb1p,
    "gpipe": gpipe,
}
