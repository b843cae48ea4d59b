"""The published schedules by name, as in configs and on the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dualpipe_jax.schedules.generators.dualpipe import dualpipe
from dualpipe_jax.schedules.generators.dualpipev import dualpipev
from dualpipe_jax.schedules.generators.gpipe import gpipe
from dualpipe_jax.schedules.generators.interleaved_1f1b import interleaved_1f1b
from dualpipe_jax.schedules.generators.interleaved_zero_bubble import (
    interleaved_zero_bubble,
)
from dualpipe_jax.schedules.generators.looped_bfs import looped_bfs
from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
from dualpipe_jax.schedules.generators.v_half import v_half
from dualpipe_jax.schedules.generators.v_min import v_min
from dualpipe_jax.schedules.generators.zb1p import zb1p
from dualpipe_jax.schedules.generators.zbv import zbv
from dualpipe_jax.schedules.schedule import Schedule

# Those that take any number of stages a rank, 2 by default.
_INTERLEAVED: dict[str, Callable[..., Schedule]] = {
    "interleaved_1f1b": interleaved_1f1b,
    "interleaved_zero_bubble": interleaved_zero_bubble,
    "looped_bfs": looped_bfs,
}
# Name -> (num_ranks, num_microbatches) -> Schedule; 1F1B has two names.
SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
    "1f1b": one_f_one_b,
    "one_f_one_b": one_f_one_b,
    "zb1p": zb1p,
    "gpipe": gpipe,
    "zbv": zbv,
    "v_half": v_half,
    "v_min": v_min,
    **_INTERLEAVED,
}


def with_stages_per_rank(
    name: str, stages_per_rank: int | None
) -> Callable[[int, int], Schedule]:
    """Returns the generator of that name, for so many stages a rank.

    Args:
      name: one of `SCHEDULES`.
      stages_per_rank: None for what the schedule has by itself.

    Raises:
      ValueError: the schedule's stages cannot be chosen.

    Examples:
      >>> with_stages_per_rank("looped_bfs", 3)(2, 4).num_stages
      6
    """
    if stages_per_rank is None:
        return SCHEDULES[name]
    if name not in _INTERLEAVED:
        raise ValueError(
            f"{stages_per_rank=} cannot be chosen for {name}; leave it out, or use one "
            f"of {', '.join(_INTERLEAVED)}."
        )
    return functools.partial(_INTERLEAVED[name], stages_per_rank=stages_per_rank)
