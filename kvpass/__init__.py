"""kvpass: rewrite the decoder language model that you have, so that its KV cache is smaller.

    import kvpass
    from kvpass.passes import GroupHeads

    slim = kvpass.transform("path/to/model", [GroupHeads(kv_heads=2)], calibration="some.txt")
    slim.save_pretrained("slim")

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpass.errors import KvpassError

__version__ = "0.1.0"

_LAZY = {
    "transform": "kvpass.api",
    "plan": "kvpass.api",
    "inspect": "kvpass.api",
    "explain": "kvpass.explanation",
    "load": "kvpass.export.program_folder",
    "Recipe": "kvpass.recipe",
}

if TYPE_CHECKING:
    from kvpass.api import inspect, plan, transform
    from kvpass.explanation import explain
    from kvpass.export.program_folder import load
    from kvpass.recipe import Recipe

__all__ = ["KvpassError", "Recipe", "explain", "inspect", "load", "plan", "transform"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvpass' has no attribute {name!r}")
