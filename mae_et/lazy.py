"""Exports of a package that load when they are first used (PEP 562).

`import mae_et` and commands such as `mae-et status` need no PyTorch, so package roots must not
import the modules behind their exports.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for the root of a package.

    Args:
        package: name of the package.
        modules: from a module's full name to the names that the package exports from it.
    """
    source = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in source:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(source[name]), name)
        setattr(sys.modules[package], name, value)  # the next access is a plain attribute
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *source})

    return load, names, sorted(source)
