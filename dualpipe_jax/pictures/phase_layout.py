"""The layout of phases inside a step of a schedule, in the published proportions."""

from __future__ import annotations

from typing import NamedTuple

# Milliseconds of four MoE layers on an H800, EP64, as `read_trace` finds them in
# DeepSeek's published training profile (deepseek-ai/profile-data@ae7fc07, train).
PUBLISHED_MS = {
    "attn(F)": 17.5,
    "dispatch(F)": 26.8,
    "mlp(F)": 18.4,
    "combine(F)": 34.7,
    "attn(B)": 37.4,
    "dispatch(B)": 29.9,
    "mlp(B)": 21.2,
    "combine(B)": 23.1,
    "attn(W)": 9.6,
    "mlp(W)": 25.5,
}
COMPUTE, COMMUNICATION = "Compute", "Communication"
# Alone, each phase waits for the one before it.
_ALONE = {
    "F": ("attn(F)", "dispatch(F)", "mlp(F)", "combine(F)"),
    "I": ("combine(B)", "mlp(B)", "dispatch(B)", "attn(B)"),
    "W": ("mlp(W)", "attn(W)"),
    "B": ("combine(B)", "mlp(B)", "mlp(W)", "dispatch(B)", "attn(B)", "attn(W)"),
}
# Of an overlapped pair, in the order of the published profile.
_PAIR = {
    COMPUTE: ("attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)", "attn(W)"),
    COMMUNICATION: ("combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"),
}


class PlacedPhase(NamedTuple):
    """A phase inside a step; begin and end are fractions of the step's duration."""

    name: str
    stream: str
    begin: float
    end: float


def layout(ops: tuple[str, ...]) -> list[PlacedPhase]:
    """Returns the phases of a step that is `("F",)`, ..., or the pair `("F", "B")`.

    Examples:
      >>> [placed.name for placed in layout(("W",))]
      ['mlp(W)', 'attn(W)']
    """
    if len(ops) == 1:
        return _in_turn(_ALONE[ops[0]], sum(PUBLISHED_MS[n] for n in _ALONE[ops[0]]))
    longest = max(sum(PUBLISHED_MS[n] for n in names) for names in _PAIR.values())
    return [placed for names in _PAIR.values() for placed in _in_turn(names, longest)]


def _in_turn(names: tuple[str, ...], whole: float) -> list[PlacedPhase]:
    placed, at = [], 0.0
    for name in names:
        end = at + PUBLISHED_MS[name] / whole
        communicates = name.startswith(("dispatch", "combine"))
        stream = COMMUNICATION if communicates else COMPUTE
        placed.append(PlacedPhase(name, stream, at, end))
        at = end
    return placed
