"""Triton's interpreter with one cost taken out: it looks through its whole language again at every call of a function.

A third of the time of a kernel made of small functions goes there. What is patched is the same; what was found in a
module is remembered. Importing this is enough.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_found: dict[Any, list[tuple[str, Any]]] = {}


def _builtins(package: Any) -> list[tuple[str, Any]]:
    if package not in _found:
        _found[package] = [(n, member) for n, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    return _found[package]


def _patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
    for name, member in _builtins(package):
        if getattr(package, name) is member:  # or it is patched already
            interpreter._patch_attr(package, name, member, builder, *scope)


interpreter._patch_builtin = _patch_builtin
