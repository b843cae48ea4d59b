"""What the processes of a run must have in common, compared before they do anything."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

from dualpipe_jax.gpu.overlap import KINDS
from dualpipe_jax.processes import distributed
from dualpipe_jax.train.config import TrainConfig
from dualpipe_jax.train.data import Text
from dualpipe_jax.train.data_order import digest
from dualpipe_jax.train.folder import Resume

_COLLECTIVE = re.compile(
    rf"= (\S+|\(.*?\)) ({'|'.join(map(re.escape, KINDS))})(?:-start)?\((.*)"
)
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs|dimensions)=[^ ]*\}|channel_id=\d+"
)


def check_agreement(
    config: TrainConfig, text: Text, folder: str | os.PathLike[str], resume: Resume
) -> None:
    """Checks that all processes were started alike; processes that were not would hang.

    Raises:
      ValueError: they were not; in all processes.
    """
    if distributed.num_processes() == 1:
        return
    facts: dict[str, Any] = json.loads(config.to_json())
    facts |= {
        "out": os.fspath(folder),
        "resume": resume,
        "data": [digest(text.train), digest(text.held_out)],
    }
    for name in ("dualpipe-jax", "jax", "jaxlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    distributed.agree({name: _in_words(value) for name, value in facts.items()})


def check_programs(digests: Mapping[str, str]) -> None:
    """Checks that all processes have compiled the same collectives, in the same order.

    Processes compile for themselves, and on GPUs by what each has measured. Collectives
    in another order would hang, or exchange the wrong arrays.

    It also waits until all have compiled: collectives of CPUs wait for each other's
    first call for 30 s only, and one process may compile what another finds in the
    cache.

    Args:
      digests: for each program that of its collectives.

    Raises:
      ValueError: they differ; in all processes.
    """
    distributed.agree(
        digests,
        verb="has compiled collectives",
        timeout=distributed.MOST_S,
        advice="give all the same XLA_FLAGS, driver and kind of device, or turn "
        "autotuning off (--xla_gpu_autotune_level=0)",
    )


def digest_of_collectives(text: str) -> str:
    r"""A digest of the collectives of a compiled program, in their order.

    Args:
      text: the program's HLO.

    Examples:
      >>> one = "%a = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, metadata={...}"
      >>> digest_of_collectives(one) == digest_of_collectives(one.replace("%a", "%b"))
      True
      >>> digest_of_collectives(one) == digest_of_collectives("\n".join([one, one]))
      False
    """
    found = [
        (shape, opcode, _GROUPS.findall(rest))
        for shape, opcode, rest in _COLLECTIVE.findall(text)
    ]
    return f"{len(found)} of digest {zlib.crc32(repr(found).encode()):08x}"


def _in_words(value: Any) -> str:
    """A value as JSON; a long one with a checksum in place of its end.

    Examples:
      >>> _in_words({"pp": 2})
      '{"pp": 2}'
    """
    text = json.dumps(value)
    short = f"{text[:60]}... ({zlib.crc32(text.encode()):08x})"
    return text if len(text) <= len(short) else short
