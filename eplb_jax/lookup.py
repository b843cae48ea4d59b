"""Names that are looked up when they are used.

A package's public names may need jax, flax or matplotlib, and an object may be shown
by code that imports the object's own module. Here such names are strings, so that
importing a package stays cheap and imports run one way.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def find(target: str) -> Any:
    """Returns the object that `module:name` names.

    Examples:
      >>> find("math:sqrt")(9.0)
      3.0
    """
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def attach(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the `__getattr__` and `__dir__` of a package that loads names on first use.

    Args:
      package: the package's `__name__`.
      modules: for each name, the module that defines it.

    Returns:
      The two functions, as in PEP 562.
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
    """Makes a method that passes its object to the function that `module:name` names.

    Examples:
      >>> class Shown:
      ...     _repr_html_ = method("builtins:repr")
      >>> Shown()._repr_html_()[:18]
      '<eplb_jax.lookup.S'
    """

    def call(self: Any, *args: Any) -> Any:
        return find(target)(self, *args)

    return call
