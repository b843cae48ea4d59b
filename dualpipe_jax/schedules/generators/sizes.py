"""A limit for schedules that somebody names by their sizes."""

from __future__ import annotations

# A schedule of as many takes about a gigabyte, and half a minute to make.
MAX_CELLS = 2**20


def check_size(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> None:
    """Refuses sizes whose schedule would not fit into memory, before it is made.

    Raises:
      ValueError: ranks times microbatches, times the stages of a rank that a user has
        chosen, are more than a million.

    Examples:
      >>> check_size(4, 10**7)
      Traceback (most recent call last):
      ValueError: num_ranks=4 times num_microbatches=10000000 is more than 1,048,576,...
    """
    if num_ranks * num_microbatches * stages_per_rank > MAX_CELLS:
        stages = f" times {stages_per_rank=}" if stages_per_rank > 1 else ""
        raise ValueError(
            f"{num_ranks=} times {num_microbatches=}{stages} is more than "
            f"{MAX_CELLS:,}, for which a schedule takes a gigabyte; use fewer "
            "microbatches: beyond a few per rank, bubbles only shrink as their inverse."
        )
