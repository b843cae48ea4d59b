"""The metrics of a server as text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping

# Name -> type, and what it is.
_KNOWN = {
    "balancedness": ("gauge", "mean over maximum of the devices' load, mean of layers"),
    "balancedness_worst": ("gauge", "of the layer where it is least"),
    "num_moves": ("counter", "slots whose expert was changed"),
    "num_refused": ("counter", "plans that the devices did not agree on"),
    "num_stranded": ("gauge", "layers with experts on a device that is to be left"),
    "num_overflowed": ("counter", "choices of experts that found no room"),
    "num_waiting": ("gauge", "requests without a slot"),
    "num_running": ("gauge", "requests with a slot"),
    "num_prefills": ("counter", "prefills"),
    "num_decode_steps": ("counter", "decode steps"),
    "num_tokens": ("counter", "tokens written"),
    "tokens_per_s": ("gauge", "tokens written a second of steps"),
}


def prometheus(metrics: Mapping[str, float], prefix: str = "eplb") -> str:
    """`Engine.metrics` in Prometheus' text format.

    Args:
      metrics: name -> value.
      prefix: of the names.

    Returns:
      Text, to be written to a file that a node exporter collects, or to be served.

    Examples:
      >>> print(prometheus({"num_moves": 12.0}), end="")
      # HELP eplb_moves_total slots whose expert was changed
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
