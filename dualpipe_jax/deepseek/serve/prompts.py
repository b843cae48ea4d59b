"""Divides prompts into the two microbatches of a prefill, with equal attention.

Each row of a microbatch is a prompt or a part of one. Shape suffixes: see
`dualpipe_jax.deepseek`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Share of all attention that does not justify one more row, which is computed at full
# length.
_UNEVEN = 0.1


# Where the tokens of a prompt that a prefill computes start and stop.
Span = tuple[int, int]


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a prompt.

    Attributes:
      prompt: index in the list of prompts.
      start: where the prompt's span starts, or the second part of a split one.
      stop: where the span stops, or the first part of a split one.
    """

    prompt: int
    start: int
    stop: int


class Halves(NamedTuple):
    """The pieces that each microbatch computes, in the order of its rows.

    A split prompt is in the last row of the first microbatch and in row 0 of the
    second, whose attention also sees that last row.

    Attributes:
      first: by row; None for an empty row.
      second: the same.
    """

    first: list[Piece | None]
    second: list[Piece | None]

    def attention(self) -> tuple[int, int]:
        """Counts the pairs of a token and one not after it, in each microbatch."""
        first, second = (
            sum(_pairs(piece.start, piece.stop) for piece in half if piece is not None)
            for half in self
        )
        return first, second


def halve_prompts(
    spans: Sequence[Span], num_tokens: int, num_rows: int
) -> Halves | None:
    """Divides prompts so that both microbatches have equal attention to compute.

    One prompt may be split between them, as in DeepSeek's published prefill profile
    (deepseek-ai/profile-data).

    Args:
      spans: of each prompt the tokens to compute, at least one; those before them are
        in the cache.
      num_tokens: most tokens of a microbatch.
      num_rows: most prompts or parts of one in a microbatch.

    Returns:
      `Halves`; None if the prompts do not fit.

    Examples:
      >>> halves = halve_prompts([(0, 100)], 80, 2)
      >>> halves.first[-1][1:], halves.second[0][1:], halves.attention()
      ((0, 71), (71, 100), (2556, 2494))
    """
    best, least = None, 2.0
    for candidate, is_split in _candidates(spans, num_tokens, num_rows):
        first, second = candidate.attention()
        uneven = abs(first - second) / max(1, first + second)
        cost = uneven + (_UNEVEN if is_split else 0.0)
        if cost < least:
            best, least = candidate, cost
    return best


def _candidates(
    spans: Sequence[Span], num_tokens: int, num_rows: int
) -> Iterator[tuple[Halves, bool]]:
    """Yields the divisions that fit: with no prompt split, or with any one of them."""
    for split in (None, *range(len(spans))):
        bins = _fill(spans, split, num_tokens, num_rows)
        if bins is None:
            continue
        if split is None:
            rest = [[None] * (num_rows - len(each)) for each in bins]
            yield Halves([*bins[0], *rest[0]], [*bins[1], *rest[1]]), False
            continue
        start, stop = spans[split]
        for one, other in (bins, bins[::-1]):
            if max(len(one), len(other)) >= num_rows:
                continue
            room, more = (
                num_tokens - sum(piece.stop - piece.start for piece in each)
                for each in (one, other)
            )
            at = _cut(start, stop, _total(one), _total(other))
            at = min(max(at, stop - more, start + 1), start + room, stop - 1)
            if at < max(start + 1, stop - more):
                continue
            gaps = [[None] * (num_rows - 1 - len(each)) for each in (one, other)]
            head, tail = Piece(split, start, at), Piece(split, at, stop)
            yield Halves([*one, *gaps[0], head], [tail, *other, *gaps[1]]), True


def _fill(
    spans: Sequence[Span], split: int | None, num_tokens: int, num_rows: int
) -> list[list[Piece]] | None:
    """Assigns all prompts but `split`, longest first, where there is less attention."""
    bins: list[list[Piece]] = [[], []]
    lengths = [stop - start for start, stop in spans]
    for prompt in np.argsort([-length for length in lengths], kind="stable").tolist():
        if prompt == split:
            continue
        piece = Piece(prompt, *spans[prompt])
        for each in sorted(bins, key=_total):
            tokens = sum(lengths[other.prompt] for other in each) + lengths[prompt]
            if tokens <= num_tokens and len(each) < num_rows:
                each.append(piece)
                break
        else:
            return None
    return bins


def _cut(start: int, stop: int, before: int, after: int) -> int:
    """Returns where to cut a span so that both sides have about equal attention.

    The pairs of the first part and `before` should be half of all pairs.
    """
    wanted = (_pairs(start, stop) + after - before) / 2
    return round(max(0.0, 2 * wanted + start**2) ** 0.5)


def _total(pieces: Sequence[Piece]) -> int:
    return sum(_pairs(piece.start, piece.stop) for piece in pieces)


def _pairs(start: int, stop: int) -> int:
    """Counts tokens `start` to `stop`, each with itself and all tokens before it."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


@dataclasses.dataclass(frozen=True)
class PromptArrays:
    """One microbatch of a device as arrays; see `arrays.Prompts`.

    Attributes:
      tokens: [M] int32.
      positions: [M] int32.
      rows: [M] int32.
      prompts: [B] int32, index of the prompt in each row; -1 for none.
      last: [B] int32.
    """

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    prompts: np.ndarray
    last: np.ndarray


def as_arrays(
    pieces: Sequence[Piece | None], prompts: Sequence[np.ndarray], num_tokens: int
) -> PromptArrays:
    """Packs the pieces of a microbatch one after another.

    Args:
      pieces: for each row.
      prompts: the prompts that they are pieces of.
      num_tokens: size of the microbatch, which padding fills up.
    """
    tokens, positions = (np.zeros(num_tokens, np.int32) for _ in range(2))
    rows = np.full(num_tokens, -1, np.int32)
    numbers, last = (np.full(len(pieces), -1, np.int32) for _ in range(2))
    at = 0
    for row, piece in enumerate(pieces):
        if piece is None:
            continue
        end = at + piece.stop - piece.start
        tokens[at:end] = prompts[piece.prompt][piece.start : piece.stop]
        positions[at:end] = np.arange(piece.start, piece.stop)
        rows[at:end] = row
        numbers[row] = piece.prompt
        if piece.stop == len(prompts[piece.prompt]):
            last[row] = end - 1
        at = end
    return PromptArrays(tokens, positions, rows, numbers, last)
