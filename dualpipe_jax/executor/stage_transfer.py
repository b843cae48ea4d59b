"""Moves stage parameters to the ranks that run them, and their gradients back.

The user keeps one copy of each stage: with the stage axis sharded over `pp`, rank r
owns stages `r*V .. r*V+V-1`. A schedule may run stage s on any rank, DualPipe on two.
`StageParamTransfer` turns the owned layout into the chunks of a program and back, by
permutes outside all rank-dependent control flow.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax.lowering import Program


@dataclasses.dataclass(frozen=True)
class _Move:
    """One permute: what each rank sends and where each puts what it receives."""

    pairs: tuple[tuple[int, int], ...]
    owned: np.ndarray  # [num_ranks] index among the owned stages that a rank sends
    chunk: np.ndarray  # [num_ranks] chunk that a rank receives, -1 for none


class StageParamTransfer:
    """The moves between a program's chunks and the owners of its stages."""

    def __init__(self, program: Program, axis_name: str):
        schedule = program.schedule
        self.axis_name = axis_name
        self.num_ranks = schedule.num_ranks
        self.num_owned = schedule.num_stages // schedule.num_ranks
        self.num_chunks = len(program.chunks[0])
        self.moves = self._plan(program)

    def _plan(self, program: Program) -> list[_Move]:
        wanted = [
            (rank, chunk, *divmod(stage, self.num_owned))
            for rank, stages in enumerate(program.chunks)
            for chunk, stage in enumerate(stages)
        ]
        moves = []
        # Stages that stay on their rank go first, all at once and without a permute.
        local = [(r, c, o, v) for r, c, o, v in wanted if r == o]
        remote = [item for item in wanted if item not in local]
        while local or remote:
            pending = local or remote
            taken: list[tuple[int, int, int, int]] = []
            for item in pending:
                if all(item[0] != t[0] and item[2] != t[2] for t in taken):
                    taken.append(item)
            owned = np.zeros(self.num_ranks, np.int32)
            chunk = np.full(self.num_ranks, -1, np.int32)
            for rank, c, owner, v in taken:
                owned[owner], chunk[rank] = v, c
                pending.remove((rank, c, owner, v))
            pairs = tuple((owner, rank) for rank, _, owner, _ in taken)
            moves.append(_Move(pairs, owned, chunk))
        return moves

    def to_chunks(self, owned: Any, rank: jax.Array) -> tuple[Any, ...]:
        """Turns owned stages, leaves [V, ...], into a tuple of chunks, leaves [...]."""
        chunks: list[Any] = [None] * self.num_chunks
        for move in self.moves:
            pick = functools.partial(_pick, index=move.owned, rank=rank)
            sent = jax.tree.map(pick, owned)
            got = self._permute(sent, move.pairs)
            for c in range(self.num_chunks):
                here = move.chunk == c
                if not here.any():
                    continue
                if chunks[c] is None or here.all():
                    chunks[c] = got
                else:
                    mine = jnp.asarray(here)[rank]
                    chunks[c] = _select(mine, got, chunks[c])
        return tuple(chunks)

    def to_owners(self, chunks: tuple[Any, ...], rank: jax.Array) -> Any:
        """Sums chunks, leaves [...], into the owned layout, leaves [V, ...]."""
        owned: list[Any] = [None] * self.num_owned
        for move in self.moves:
            sent = chunks[0]
            for c in range(1, self.num_chunks):
                sent = _select(jnp.asarray(move.chunk == c)[rank], chunks[c], sent)
            got = self._permute(sent, tuple((b, a) for a, b in move.pairs))
            received = np.zeros(self.num_ranks, bool)
            received[[owner for owner, _ in move.pairs]] = True
            for v in range(self.num_owned):
                here = received & (move.owned == v)
                if not here.any():
                    continue
                part = got
                if not here.all():
                    none = jax.tree.map(jnp.zeros_like, got)
                    part = _select(jnp.asarray(here)[rank], got, none)
                if owned[v] is not None:
                    part = jax.tree.map(jnp.add, owned[v], part)
                owned[v] = part
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *owned)

    def _permute(self, tree: Any, pairs: tuple[tuple[int, int], ...]) -> Any:
        if all(source == target for source, target in pairs):
            return tree
        return lax.ppermute(tree, self.axis_name, pairs)


def _pick(leaf: jax.Array, index: np.ndarray, rank: jax.Array) -> jax.Array:
    if leaf.shape[0] == 1:
        return leaf[0]
    return lax.dynamic_index_in_dim(
        leaf, jnp.asarray(index)[rank], axis=0, keepdims=False
    )


def _select(mine: jax.Array, here: Any, there: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(mine, a, b), here, there)
