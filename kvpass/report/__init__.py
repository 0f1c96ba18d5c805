"""The report: what a recipe did to a model, as one HTML file that needs no network and no script.

`measure` transforms a model pass by pass and gives `Figures`, `render` makes a page of them, `write` does both. They
are imported when they are used: the command line takes in this package's command, and its help needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_LAZY = {
    "Figures": "kvpass.report.figures",
    "Sizes": "kvpass.report.figures",
    "measure": "kvpass.report.figures",
    "render": "kvpass.report.page",
    "write": "kvpass.report.page",
}

if TYPE_CHECKING:
    from kvpass.report.figures import Figures, Sizes, measure
    from kvpass.report.page import render, write

__all__ = ["Figures", "Sizes", "measure", "render", "write"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvpass.report' has no attribute {name!r}")
