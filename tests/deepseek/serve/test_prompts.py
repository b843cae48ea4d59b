"""Prompts in two microbatches: everything once, within limits, and evenly."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dualpipe_jax.deepseek.serve.prompts import as_arrays, halve_prompts


def attention(piece):
    """Pairs, one by one."""
    return sum(position + 1 for position in range(piece.start, piece.stop))


spans = st.tuples(st.integers(0, 30), st.integers(1, 40)).map(lambda x: (x[0], sum(x)))


@settings(deadline=None, derandomize=True)
@given(st.lists(spans, min_size=1, max_size=6), st.integers(20, 60), st.integers(1, 4))
def test_every_token_once_and_no_half_too_full(spans, num_tokens, num_rows):
    halves = halve_prompts(spans, num_tokens, num_rows)
    if halves is None:
        # One prompt always fits, in two parts if it must: else a server would wait for
        # ever.
        assert len(spans) > 1
        return
    covered = [np.zeros(stop, int) for _, stop in spans]
    for half in halves:
        pieces = [piece for piece in half if piece is not None]
        assert len(half) == num_rows
        assert sum(piece.stop - piece.start for piece in pieces) <= num_tokens
        for piece in pieces:
            covered[piece.prompt][piece.start : piece.stop] += 1
    for each, (start, _) in zip(covered, spans, strict=True):
        assert (each[start:] == 1).all() and not each[:start].any()
    first, second = halves
    for piece in (*first, *second):
        if piece is not None and piece.stop < spans[piece.prompt][1]:
            assert piece is first[-1] and piece.start == spans[piece.prompt][0]
            assert second[0] == (piece.prompt, piece.stop, spans[piece.prompt][1])
    totals = tuple(
        sum(attention(piece) for piece in half if piece is not None) for half in halves
    )
    assert halves.attention() == totals


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_attention_is_even_where_there_is_room(lengths):
    halves = halve_prompts([(0, n) for n in lengths], sum(lengths), len(lengths) + 1)
    first, second = halves.attention()
    # What is not worth a split, and the rounding of one token of the longest prompt.
    assert abs(first - second) <= 0.1 * (first + second) + max(lengths)


def test_four_prompts_of_one_length_stay_whole():
    halves = halve_prompts([(0, 4096)] * 4, 8192, 2)
    assert all(piece[1:] == (0, 4096) for half in halves for piece in half)


@pytest.mark.parametrize("length", [1, 9])
def test_arrays_of_a_microbatch(length):
    prompts = [np.arange(10, 10 + length), np.arange(50, 56)]
    first, second = halve_prompts([(0, length), (0, 6)], 8, 2)
    one, two = (as_arrays(half, prompts, 8) for half in (first, second))
    for part, half in ((one, first), (two, second)):
        at = 0
        for row, piece in enumerate(half):
            if piece is None:
                assert part.prompts[row] == part.last[row] == -1
                continue
            here = slice(at, at + piece.stop - piece.start)
            expected = prompts[piece.prompt][piece.start : piece.stop]
            np.testing.assert_array_equal(part.tokens[here], expected)
            np.testing.assert_array_equal(
                part.positions[here], np.arange(piece.start, piece.stop)
            )
            assert (part.rows[here] == row).all()
            ends = piece.stop == len(prompts[piece.prompt])
            assert part.last[row] == (here.stop - 1 if ends else -1)
            at = here.stop
        assert (part.rows[at:] == -1).all()


def test_a_piece_is_cut_by_what_it_attends_to():
    """Each token of it also attends to all of the prompt before it."""
    halves = halve_prompts([(300, 400)], 60, 2)
    head, tail = halves.first[-1], halves.second[0]
    assert head.start == 300 and tail.stop == 400 and head.stop == tail.start
    first, second = halves.attention()
    assert abs(first - second) <= 400  # the rounding of one token
    assert halve_prompts([(300, 400)], 49, 2) is None
