"""The report: what a recipe did to a model, as one HTML file that needs no network and no script.

`measure` transforms a model pass by pass and gives `Figures`, `render` makes a page of them, `write` does both.
"""

from kvpass.report.figures import Figures, Sizes, measure
from kvpass.report.page import render, write

__all__ = ["Figures", "Sizes", "measure", "render", "write"]
