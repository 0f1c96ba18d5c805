"""What kvpass can do to a model: one file per rewrite.

- `GroupHeads`: merge KV heads (multi-head attention to GQA or MQA).
- `SplitProjections`: give q, k and v projections of their own (a layout pass, run where another needs it).
- `insert_cache`: turn the plan into `prefill` and `decode` (run last, by the runtime).
"""

from kvpass.passes.base import Context, Effect, Pass, Rewritten
from kvpass.passes.group_heads import GroupHeads
from kvpass.passes.split_projections import SplitProjections

__all__ = ["Context", "Effect", "GroupHeads", "Pass", "Rewritten", "SplitProjections"]
