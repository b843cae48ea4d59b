"""Names that are looked up when they are used.

What a package hands out may need jax, flax or matplotlib, and an object may be shown by
code that stands above it. Both are named by text here, so that importing a package
stays cheap and imports run one way.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def find(target: str) -> Any:
    """The object that `module:name` names.

    Examples:
      >>> find("math:sqrt")(9.0)
      3.0
    """
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def attach(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names load on first use.

    Args:
      package: the package's `__name__`.
      modules: for each name the module that defines it.

    Returns:
      Two functions, as PEP 562 describes them.
    """
    namespace = vars(sys.modules[package])

    def getattribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value = find(f"{modules[name]}:{name}")
        return value

    def names() -> list[str]:
        return sorted({*namespace, *namespace.get("__all__", ())})

    return getattribute, names


def method(target: str) -> Callable[..., Any]:
    """A method that calls the function that `module:name` names, on its object.

    Examples:
      >>> class Shown:
      ...     _repr_html_ = method("builtins:repr")
      >>> Shown()._repr_html_()[:18]
      '<eplb_jax.lookup.S'
    """

    def call(self: Any, *args: Any) -> Any:
        return find(target)(self, *args)

    return call
