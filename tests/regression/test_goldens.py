"""What the recipes make of twelve families, as it was reviewed: the goldens beside this file.

`make goldens` writes them again; a pull request then shows what a change of kvpass did to whom.
"""

from __future__ import annotations

import pytest

from families import build
from kvpass.errors import PlanError, UnsupportedError
from kvpass.passes import EvictKV, GroupHeads, PageKV, Pass, PrunePyramid, QuantizeKV, ShareLayers, SlideWindow
from small_models import quick

FAMILIES = (
    "bloom",
    "cohere2",
    "falcon",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
)
REFUSED = {
    ("cohere2", "share-down"): "rotate keys differently",
    ("cohere2", "share-up"): "rotate keys differently",
    ("mistral", "evict-kv"): "every layer keeps a window only",
}


def recipes(kv_heads: int) -> dict[str, list[Pass]]:
    """The main recipes, for a model with so many KV heads."""
    fewer = GroupHeads(max(kv_heads // 2, 1), method="mean")
    return {
        "as-is": [],
        "group-heads": [fewer],
        "share-down": [ShareLayers("cla:2")],
        "share-up": [ShareLayers("lckv:1")],
        "slide-window": [SlideWindow(6, 2)],
        "evict-kv": [EvictKV("snapkv", keep=0.5, window=4)],
        "prune-pyramid": [PrunePyramid(schedule="pyramidinfer", decay=0.6)],
        "quantize-kv": [QuantizeKV(8)],
        "together": [fewer, SlideWindow(6, 2), QuantizeKV(8), PageKV(4)],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_make_of_a_family_what_was_reviewed(family, kv_regression):
    base = quick(build(family))
    for name, steps in recipes(base.plan[0].kv_heads).items():
        if (family, name) in REFUSED:
            with pytest.raises((PlanError, UnsupportedError), match=REFUSED[family, name]):
                quick(base, *steps)
            continue
        kv_regression.check(base, steps, name=name)
