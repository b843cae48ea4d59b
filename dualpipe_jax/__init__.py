"""DualPipe for JAX: pipeline schedules as data, run as one jitted SPMD program.

Schedules, their simulator and their lowering need no jax, so importing this
package does not import it; the names that do need it are loaded when first used.
"""

from typing import TYPE_CHECKING

from dualpipe_jax.schedule import Schedule, Task

if TYPE_CHECKING:
    pass

__version__ = "0.1.0"

__all__ = [
    "Schedule",
    "Task",
]

# Exported names that need jax, and the modules that define them (PEP 562).
_NEEDS_JAX: dict[str, str] = {}


def __getattr__(name: str):
    if name not in _NEEDS_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_NEEDS_JAX[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
