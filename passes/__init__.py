"""What kvpass can do to a model: one file per rewrite.

- `GroupHeads`: merge KV heads (multi-head attention to GQA or MQA).
- `ShareLayers`: let layers read another layer's keys and values (CLA, YOCO, LCKV).
- `SlideWindow`: the first tokens and the latest, in constant memory (StreamingLLM).
- `QuantizeKV`: int8, int4 and fp8 caches, per token or as KIVI.
- `PrunePyramid`: only the tokens that matter go on to the layers above (PyramidInfer, FastKV).
- `EvictKV`: keep the entries that will be asked for (SnapKV, PyramidKV, H2O, Scissorhands, TOVA).
- `PageKV`: pages and tables per sequence (PagedAttention).
- `SplitProjections`: give q, k and v projections of their own (a layout pass, run where another needs it).
- `insert_cache`: turn the plan into `prefill` and `decode` (run last, by the runtime).
"""

from kvpass.passes.base import Context, Effect, Pass, Rewritten
from kvpass.passes.evict_kv import EvictKV
from kvpass.passes.group_heads import GroupHeads
from kvpass.passes.page_kv import PageKV
from kvpass.passes.prune_pyramid import PrunePyramid
from kvpass.passes.quantize_kv import QuantizeKV
from kvpass.passes.share_layers import ShareLayers
from kvpass.passes.slide_window import SlideWindow
from kvpass.passes.split_projections import SplitProjections

__all__ = [
    "Context",
    "Effect",
    "EvictKV",
    "GroupHeads",
    "PageKV",
    "Pass",
    "PrunePyramid",
    "QuantizeKV",
    "Rewritten",
    "ShareLayers",
    "SlideWindow",
    "SplitProjections",
]
