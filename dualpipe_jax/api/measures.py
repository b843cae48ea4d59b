"""What is measured of requests, as text that Prometheus reads."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dualpipe_jax.deepseek.serve import prometheus

# Seconds, about three to a decade.
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Histogram:
    """Counts values by size, as Prometheus' histograms do.

    Examples:
      >>> histogram = Histogram([0.1, 1.0])
      >>> for value in (0.05, 0.5, 0.5, 7):
      ...     histogram.add(value)
      >>> print("".join(histogram.lines("wait_seconds", "time in the queue")), end="")
      # HELP wait_seconds time in the queue
      # TYPE wait_seconds histogram
      wait_seconds_bucket{le="0.1"} 1
      wait_seconds_bucket{le="1.0"} 3
      wait_seconds_bucket{le="+Inf"} 4
      wait_seconds_sum 8.05
      wait_seconds_count 4
    """

    def __init__(self, bounds: Sequence[float] = _BOUNDS):
        """Makes an empty one; `bounds` are increasing."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, what: str) -> Iterable[str]:
        """Yields lines of text for Prometheus."""
        yield from _head(name, what, "histogram")
        total = 0
        names = [*map(str, self._bounds), "+Inf"]
        for bound, count in zip(names, list(self._counts), strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}\n'
        yield f"{name}_sum {self._sum}\n"
        yield f"{name}_count {total}\n"


class Measures:
    """What is measured of requests.

    Attributes:
      first: seconds from a request to its first token.
      between: seconds between two tokens of a request.
      answers: HTTP's status codes.
    """

    def __init__(self):
        self.first, self.between = Histogram(), Histogram()
        self.answers: Counter[int] = Counter()

    def add_token(self, seconds: float, is_first: bool) -> None:
        """Counts a token that came after so many seconds."""
        (self.first if is_first else self.between).add(seconds)

    def text(
        self,
        metrics: Mapping[str, float] | None,
        layers: Mapping[str, np.ndarray] | None,
        prefix: str = "eplb",
    ) -> str:
        """Returns all of it, with an engine's metrics.

        Args:
          metrics: `Engine.metrics()`; None while it starts.
          layers: `Engine.layer_metrics()`.
          prefix: of the names.
        """
        name = f"{prefix}_answers_total"
        parts = [*_head(name, "answers by HTTP status", "counter")]
        parts += [
            f'{name}{{code="{code}"}} {count}\n'
            for code, count in sorted(self.answers.items())
        ]
        parts += self.first.lines(
            f"{prefix}_time_to_first_token_seconds", "from a request to its first token"
        )
        parts += self.between.lines(
            f"{prefix}_time_between_tokens_seconds", "between two tokens of a request"
        )
        if metrics is not None:
            parts.append(prometheus(metrics, prefix))
        if layers is not None:
            name = f"{prefix}_layer_balancedness"
            parts += _head(name, "balancedness of each MoE layer", "gauge")
            parts += [
                f'{name}{{layer="{layer}"}} {value:.6g}\n'
                for layer, value in enumerate(layers["balancedness"])
            ]
            name = f"{prefix}_device_load"
            what = "load of each device over the mean, by MoE layer"
            parts += _head(name, what, "gauge")
            parts += [
                f'{name}{{layer="{layer}",device="{device}"}} {value:.6g}\n'
                for layer, row in enumerate(layers["device_loads"])
                for device, value in enumerate(row)
            ]
        return "".join(parts)


def _head(name: str, what: str, kind: str) -> Iterable[str]:
    return f"# HELP {name} {what}\n", f"# TYPE {name} {kind}\n"
