"""The metrics of a server as text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping

# Name -> type and description.
_KNOWN = {
    "balancedness": (
        "gauge",
        "mean load of the devices over the largest, averaged over layers",
    ),
    "balancedness_worst": ("gauge", "balancedness of the least balanced layer"),
    "num_moves": ("counter", "physical experts that were given another expert"),
    "num_refused": ("counter", "plans refused because devices disagreed"),
    "num_rejected": ("counter", "plans of a layer that would have gained too little"),
    "num_stranded": ("gauge", "layers with experts on a device of speed 0"),
    "num_overflowed": ("counter", "expert choices that exceeded a buffer"),
    "num_fetched": ("counter", "experts that devices fetched for one step"),
    "num_waiting": ("gauge", "requests without a request slot"),
    "num_running": ("gauge", "requests with a request slot"),
    "num_prefills": ("counter", "prefills"),
    "num_decode_steps": ("counter", "decode steps"),
    "num_tokens": ("counter", "generated tokens"),
    "tokens_per_s": ("gauge", "generated tokens per second of steps"),
}


def prometheus(metrics: Mapping[str, float], prefix: str = "eplb") -> str:
    """Formats `Engine.metrics` as Prometheus' text.

    Args:
      metrics: name -> value.
      prefix: of the names.

    Returns:
      Text, to be written to a file that a node exporter collects, or to be served.

    Examples:
      >>> print(prometheus({"num_moves": 12.0}), end="")
      # HELP eplb_moves_total physical experts that were given another expert
      # TYPE eplb_moves_total counter
      eplb_moves_total 12.0
    """
    lines = []
    for name, value in metrics.items():
        kind, what = _KNOWN.get(name, ("gauge", name))
        full = f"{prefix}_{name.removeprefix('num_')}"
        full += "_total" if kind == "counter" else ""
        lines += [f"# HELP {full} {what}", f"# TYPE {full} {kind}", f"{full} {value}"]
    return "".join(f"{line}\n" for line in lines)
