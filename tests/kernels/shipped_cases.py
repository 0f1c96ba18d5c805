"""The cases of `kvpass.kernels.cases` that every run of the tests compiles, some 30 s of one core in all.

H100's machine code is looked at broadly: each kernel once, and those whose lengths vary over all of them. For the other
targets stand the widest tile with the most to hold at once, codes as they are read, and codes as they are written.
"""

from __future__ import annotations

from kvpass.kernels import cases as shipped
from kvpass.kernels.aot import Case

NARROW = (
    "attention, prefill, D 128, bf16, window, sinks scored apart",
    "attention, decode, D 128, int4, pages of 16",
    "attention, decode, D 128, int8",
    "append, D 128, int4",
)
BROAD = (
    *NARROW,
    "attention, prefill, D 128, bf16",
    "attention, decode, D 128, bf16, any length",
    "attention, decode, D 128, KIVI int4, groups of 32",
    "append, D 128, int8, ring, any length",
    "close groups, D 128, KIVI int4, groups of 32",
    "column mass, D 128, bf16, any length",
    "rope and append, D 128, bf16, pages of 16, any length",
    "merge, D 128, sink logits",
    "compact, 128 codes",
    "scatter pages, 128 codes",
    "copy pages, 128 codes",
)


def cases(target: str) -> list[Case]:
    labels = BROAD if target == "sm_90" else NARROW
    found = {case.label: case for case in shipped.cases(target)}
    return [found[label] for label in labels]
