"""The phases of a training step, in the names of DeepSeek's published profile.

A phase is a part of a layer (attn, dispatch, mlp, combine) in a pass over it: `(F)`
forward, `(B)` backward for the inputs, `(W)` backward for the weights. (B here is what
a schedule calls I: in the published profile, `B` is the backward without the weight
gradients, which have their own phase.)
"""

from __future__ import annotations

import re

PARTS = ("attn", "dispatch", "mlp", "combine")
PASSES = ("F", "B", "W")
SCOPES = {
    "attn": "attn",
    "attention": "attn",
    "mla": "attn",
    "dispatch": "dispatch",
    "mlp": "mlp",
    "moe": "mlp",
    "ffn": "mlp",
    "experts": "mlp",
    "combine": "combine",
}
# Names of an overlapped pair of a forward and a backward, as in published profiles.
PAIR_NAMES = ("1F1B", "F&B")
WEIGHTS = "W"
_WEIGHTS = (WEIGHTS, "wgrad")
_NAME = re.compile(rf"({'|'.join(SCOPES)})\(([{''.join(PASSES)}])\)", re.IGNORECASE)


def phase(op_name: str) -> str | None:
    """Returns DeepSeek's name of the phase of an operation; None if unknown.

    It is read from the path of `jax.named_scope`s and transformations: the innermost
    scope called `attn`, `dispatch`, `mlp` or `combine` (or a synonym) is the part;
    `transpose(...)` makes it B; a scope called `W` makes it W.

    Examples:
      >>> phase("jit(step)/while/body/transpose(jvp(mlp))/dot_general")
      'mlp(B)'
      >>> phase("jit(step)/while/body/W/transpose(jvp(mlp))/dot_general")
      'mlp(W)'
    """
    words = re.split(r"[/()]+", op_name)
    known = [SCOPES[word] for word in words if word in SCOPES]
    if not known:
        return None
    if any(word in _WEIGHTS for word in words):
        return f"{known[-1]}(W)"
    return f"{known[-1]}({'B' if 'transpose(' in op_name else 'F'})"


def named_phase(annotation: str) -> str | None:
    """Returns the phase that an annotation spells out; None if there is none.

    Examples:
      >>> named_phase("dispatch(F)"), named_phase("moe(B)"), named_phase("step")
      ('dispatch(F)', 'mlp(B)', None)
    """
    found = _NAME.fullmatch(annotation.strip())
    if found is None:
        return None
    return f"{SCOPES[found[1].lower()]}({found[2].upper()})"


def pass_of(name: str) -> str | None:
    """Returns the pass of a phase: `"F"`, `"B"` or `"W"`; None if it has none.

    Examples:
      >>> pass_of("mlp(W)")
      'W'
    """
    found = _NAME.fullmatch(name)
    return found[2].upper() if found else None
