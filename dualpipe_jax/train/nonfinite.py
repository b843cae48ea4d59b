"""Steps whose loss or gradient is not finite: when the run ends, and what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dualpipe_jax.train.integrity import few


class Guard:
    """Looks at each step of a run.

    Args:
      max_skipped: see `TrainConfig.max_skipped_steps`.

    Examples:
      >>> watch = Guard(max_skipped=1)
      >>> watch.fault({"step": 1, "loss": 2.5, "grad_norm": 1.0})
      ''
      >>> watch.fault({"step": 2, "loss": 2.5, "grad_norm": float("inf")})
      ''
      >>> watch.fault({"step": 3, "loss": float("nan"), "grad_norm": 1.0})
      'loss=nan at step=3; steps that were skipped before it: 1; lower the ...'
    """

    def __init__(self, max_skipped: int):
        self._max_skipped = max_skipped
        self._in_a_row = 0

    def fault(
        self,
        record: dict[str, Any],
        names: Sequence[str] = (),
        grads_finite: Sequence[bool] | None = None,
    ) -> str:
        """Why the run must end after a step, or an empty text.

        Args:
          record: what the step measured.
          names: of the parameters that have a gradient.
          grads_finite: whether the gradient of each of them is finite, if known.
        """
        found = [
            f"{name}={record[name]}"
            for name in ("loss", "grad_norm")
            if not math.isfinite(record.get(name, 0.0))
        ]
        if not found:
            self._in_a_row = 0
            return ""
        self._in_a_row += 1
        if self._in_a_row <= self._max_skipped:
            return ""
        where = f"at step={record['step']}"
        if grads_finite is not None:
            of = [n for n, good in zip(names, grads_finite, strict=True) if not good]
            where += f" (the gradient of {few(of)})" if of else ""
        remedy = "lower the learning rate, or resume from the last checkpoint with "
        if self._max_skipped:
            where += f"; steps that were skipped before it: {self._max_skipped}"
            remedy += "other data."
        else:
            remedy += "other data, or with max_skipped_steps in the config."
        return f"{', '.join(found)} {where}; {remedy}"
