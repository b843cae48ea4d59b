"""Weights in float8 with one scale for each block, as DeepSeek publishes them.

A weight is `values * scale`, where each block of 128 x 128 values shares a scale. For
parts of files, on the host, with NumPy; the same as `eplb_jax.quantize_blocks`, but for
scales that are known.
"""

from __future__ import annotations

import numpy as np

from eplb_jax.products import E4M3 as _E4M3, LARGEST

E4M3 = np.dtype(_E4M3)
# NumPy would convert one value at a time.
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Returns the shape of the scales of a matrix.

    Examples:
      >>> scale_shape((192, 64), (128, 128))
      (2, 1)
    """
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(
    values: np.ndarray,
    scales: np.ndarray,
    block: tuple[int, int],
    start: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Returns the weights, float32, of a part of a matrix.

    Args:
      values: [rows, columns] e4m3, the part.
      scales: of the whole matrix, see `scale_shape`.
      block: rows and columns that share a scale.
      start: first row and column of the part.

    Examples:
      >>> values = np.ones((2, 3), E4M3)
      >>> dequantize(values, np.array([[2.0, 3.0]], np.float32), (2, 2)).tolist()
      [[2.0, 2.0, 3.0], [2.0, 2.0, 3.0]]
    """
    weights = _VALUES[values.view(np.uint8)]
    for rows, row_scales in _rows_of(values.shape, scales, block, start):
        weights[rows] *= row_scales
    return weights


def quantize(
    weights: np.ndarray, block: tuple[int, int], known: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns values, e4m3, and their scales.

    Args:
      weights: [rows, columns], of any floating dtype.
      block: rows and columns that share a scale.
      known: scales that some blocks may have been read with; they are used again where
        they give the weights exactly, so that what was only read is written as it was.

    Examples:
      >>> values, scales = quantize(np.array([[0.5, 7.0]], np.float32), (128, 128))
      >>> values.astype(np.float32).tolist(), scales.tolist()
      ([[32.0, 448.0]], [[0.015625]])
    """
    exact = weights.astype(np.float32)
    peak = _largest(exact, block)
    scales = np.where(peak > 0, peak / np.float32(LARGEST), np.float32(1)).astype(
        np.float32
    )
    if known is not None:
        again = dequantize(_divide(exact, known, block), known, block)
        is_same = again.astype(weights.dtype) == weights
        is_same = _largest((~is_same).astype(np.float32), block) == 0
        scales = np.where(is_same, known, scales)
    return _divide(exact, scales, block), scales


def _divide(
    weights: np.ndarray, scales: np.ndarray, block: tuple[int, int]
) -> np.ndarray:
    values = np.empty(weights.shape, E4M3)
    with np.errstate(divide="ignore", invalid="ignore"):  # a scale that is 0 or NaN
        for rows, row_scales in _rows_of(weights.shape, scales, block, (0, 0)):
            scaled = np.clip(weights[rows] / row_scales, -LARGEST, LARGEST)
            values[rows] = scaled.astype(E4M3)
    return values


def _largest(weights: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Returns the largest absolute value of each block."""
    at_rows, at_columns = (
        np.arange(0, size, step)
        for size, step in zip(weights.shape, block, strict=True)
    )
    rows = np.maximum.reduceat(np.abs(weights), at_rows, axis=0)
    return np.maximum.reduceat(rows, at_columns, axis=1)


def _rows_of(
    shape: tuple[int, ...],
    scales: np.ndarray,
    block: tuple[int, int],
    start: tuple[int, int],
):
    """Yields rows of a part that share scales, and these as [1, columns]."""
    (first, left), (height, width) = start, block
    column_block = np.arange(left, left + shape[1]) // width
    at = first
    while at < first + shape[0]:
        stop = min((at // height + 1) * height, first + shape[0])
        yield slice(at - first, stop - first), scales[at // height, column_block][None]
        at = stop
