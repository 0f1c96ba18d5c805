"""Fused Triton kernels for attention and for what is done with a KV cache around it.

Each computes what `kvpass.ir` defines in plain torch; `kvpass.passes.lower_attention` puts them into programs.
"""

import os

# read whenever a kernel is compiled; unset, Triton 3.9 warns each process that the next version changes its mind
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
