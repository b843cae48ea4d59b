"""Estimates of expert load from the counts of each step, as pytrees.

An estimator is three pure functions, in the manner of optax: a step takes a state and
returns the next one, inside jit and inside `lax.scan`. States hold arrays only, so any
checkpointer of pytrees can save them, as `save_state` and `restore_state` do.

Shape suffixes: see `eplb_jax`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eplb_jax.placement.checks import is_count, is_fraction
from eplb_jax.placement.npz import read_npz

_LESS = 2.0**-8


class LoadEstimator(NamedTuple):
    """An estimator of loads; made by `sum_of_last` or `moving_average`.

    Attributes:
      init: (num_layers, num_experts) -> state.
      observe: (state, counts [layers, experts]) -> state, after one more step. Sum the
        counts over the devices first, so that all devices agree.
      estimate: state -> [layers, experts] float32 loads; zeros before the first step.
        If they are beyond float32's range, all of them are, by one power of two, less.
    """

    init: Callable[[int, int], Any]
    observe: Callable[[Any, jax.Array], Any]
    estimate: Callable[[Any], jax.Array]


class WindowState(NamedTuple):
    """State of `sum_of_last`.

    Attributes:
      counts: [num_steps, layers, experts] float32, a ring buffer.
      num_seen: [] int32, steps observed, modulo num_steps: where to write next.
    """

    counts: jax.Array
    num_seen: jax.Array


class AverageState(NamedTuple):
    """State of `moving_average`.

    Attributes:
      total: [layers, experts] float32, decayed sum of counts.
      weight: [] float32, decayed sum of ones.
    """

    total: jax.Array
    weight: jax.Array


def sum_of_last(num_steps: int) -> LoadEstimator:
    """Estimates loads as the sum of the last `num_steps` steps: upstream's window.

    Args:
      num_steps: length of the window, at least 1. The state holds the counts of all
        these steps.

    Returns:
      A `LoadEstimator` with a `WindowState`.

    Raises:
      ValueError: if `num_steps` is less than 1.

    Examples:
      >>> window = sum_of_last(2)
      >>> state = window.init(1, 3)
      >>> for counts in ([[9, 9, 9]], [[1, 0, 2]], [[4, 1, 0]]):
      ...     state = window.observe(state, jnp.array(counts))
      >>> window.estimate(state).tolist()
      [[5.0, 1.0, 2.0]]
    """
    if not is_count(num_steps):
        raise ValueError(
            f"{num_steps=} must be at least 1, an int below 2**31; 1 is the last "
            "step only."
        )

    def init(num_layers: int, num_experts: int) -> WindowState:
        counts_WLE = jnp.zeros((num_steps, num_layers, num_experts), jnp.float32)
        return WindowState(counts_WLE, jnp.int32(0))

    def observe(state: WindowState, counts: jax.Array) -> WindowState:
        counts_LE = _as_counts(counts, state.counts.shape[1:])
        at = state.num_seen % num_steps
        counts_WLE = lax.dynamic_update_index_in_dim(state.counts, counts_LE, at, 0)
        return WindowState(counts_WLE, (at + 1) % num_steps)

    def estimate(state: WindowState) -> jax.Array:
        total_LE = state.counts.sum(axis=0)
        parts_WLE = state.counts * 0.5 ** num_steps.bit_length()
        return jnp.where(_is_finite(total_LE), total_LE, parts_WLE.sum(axis=0))

    return LoadEstimator(init, observe, estimate)


def moving_average(decay: float) -> LoadEstimator:
    """Estimates loads as an exponential average, without bias from its empty start.

    Args:
      decay: the factor that each step decays the earlier counts by, in [0, 1). The
        average reaches back about 1 / (1 - decay) steps.

    Returns:
      A `LoadEstimator` with an `AverageState`.

    Raises:
      ValueError: if `decay` is outside [0, 1).

    Examples:
      >>> average = moving_average(0.5)
      >>> state = average.init(1, 2)
      >>> for counts in ([[6, 0]], [[0, 3]]):
      ...     state = average.observe(state, jnp.array(counts))
      >>> average.estimate(state).tolist()
      [[2.0, 2.0]]
    """
    if not is_fraction(decay) or decay == 1:
        raise ValueError(f"{decay=} must be in [0, 1); 0 keeps the last step only.")

    def init(num_layers: int, num_experts: int) -> AverageState:
        total_LE = jnp.zeros((num_layers, num_experts), jnp.float32)
        return AverageState(total_LE, jnp.float32(0))

    def observe(state: AverageState, counts: jax.Array) -> AverageState:
        counts_LE = _as_counts(counts, state.total.shape)
        total_LE, weight = decay * state.total + counts_LE, decay * state.weight + 1
        # Near the end of float32's range, the average reaches back less far.
        is_inside = _is_finite(total_LE)
        less_LE = decay * (state.total * _LESS) + counts_LE * _LESS
        return AverageState(
            jnp.where(is_inside, total_LE, less_LE),
            jnp.where(is_inside, weight, weight * _LESS),
        )

    def estimate(state: AverageState) -> jax.Array:
        return state.total / jnp.maximum(state.weight, 1)

    return LoadEstimator(init, observe, estimate)


def save_state(path: str | Path, state: Any) -> None:
    """Writes a state, or any pytree of arrays, to an .npz file.

    Args:
      path: the file; its suffix becomes `.npz`.
      state: a pytree of arrays.

    Examples:
      >>> import tempfile, pathlib
      >>> average = moving_average(0.9)
      >>> state = average.observe(average.init(1, 2), jnp.array([[1, 2]]))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "loads.npz"
      ...     save_state(path, state)
      ...     again = restore_state(path, average.init(1, 2))
      >>> again.total.tolist()
      [[1.0, 2.0]]
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    target = Path(path).with_suffix(".npz")
    np.savez(target, **arrays)  # pyright: ignore[reportArgumentType]


def restore_state(path: str | Path, like: Any) -> Any:
    """Reads what `save_state` wrote.

    Args:
      path: the file.
      like: a state of the same structure, shapes and dtypes, such as a fresh one.

    Returns:
      A pytree like `like`.

    Raises:
      ValueError: if the file is damaged, or holds another structure, shape or dtype.
      OSError: if it cannot be opened.

    Examples:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "loads.npz"
      >>> save_state(path, {"mean": jnp.ones(2)})
      >>> restore_state(path, like={"mean": jnp.zeros(2)})["mean"].tolist()
      [1.0, 1.0]
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    try:
        saved = read_npz(Path(path).with_suffix(".npz"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    if sorted(names) != sorted(saved):
        raise ValueError(
            f"{path} holds {sorted(saved)}, but the state has {sorted(names)}: it was "
            "saved by another estimator."
        )
    for name, (_, leaf) in zip(names, leaves, strict=True):
        array = saved[name]
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise ValueError(
                f"{path} holds {name} as {array.dtype}{list(array.shape)}, but the "
                f"state has {leaf.dtype}{list(leaf.shape)}: it was saved with other "
                "sizes."
            )
    return structure.unflatten([jnp.asarray(saved[name]) for name in names])


def _is_finite(value: jax.Array) -> jax.Array:
    return jnp.isfinite(value).all()


def _as_counts(counts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if jnp.shape(counts) != shape:
        raise ValueError(
            f"counts has shape {jnp.shape(counts)}, but the state was made for "
            f"{shape}, [layers, experts]; pass counts of the same model."
        )
    if jnp.iscomplexobj(counts):
        raise ValueError(
            f"counts is {jnp.asarray(counts).dtype}, but they are real numbers."
        )
    return jnp.asarray(counts, jnp.float32)
